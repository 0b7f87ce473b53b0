"""The internals of comfy-kitchen's QuantizedTensor, and torch's mark of a Parameter.

Seen in comfy-kitchen 0.2.8, 0.2.10 and 0.2.26 (ComfyUI 0.18.2, 0.24.1 and 0.30.0) and in torch 2.11.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from .types import QuantizedTensor


def codes_of(weight: QuantizedTensor) -> torch.Tensor:
    """The codes, in the dtype they are stored in, on the weight's device.

    comfy-kitchen names them in public only for its layouts. Without ``_qdata`` this raises AttributeError at the first
    call of a quantized layer.
    """
    return weight._qdata


def scale_of(weight: QuantizedTensor) -> torch.Tensor:
    """float32 [] or, per channel, [out, 1...]: what the codes are multiplied by.

    Without ``_params`` this raises AttributeError as soon as a quantized model is merged or saved.
    """
    scale: torch.Tensor = weight._params.scale
    return scale


def marked_as_parameter(tensor: QuantizedTensor) -> QuantizedTensor:
    """The same tensor, which modules from now on register as a parameter.

    ``torch.nn.Parameter(tensor)`` sets this mark too, on a copy, which takes a quarter of the time to open a layer. If
    torch no longer read ``_is_param``, it would refuse the tensor as a weight with TypeError.
    """
    tensor._is_param = True
    return tensor


def is_quantized(weight: torch.Tensor) -> bool:
    """Whether a parameter holds one of comfy-kitchen's quantized tensors; checked by name, as in ComfyUI."""
    return "QuantizedTensor" in (type(weight).__name__, type(weight.data).__name__)
