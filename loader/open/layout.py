"""FP8 weights with a scale as comfy-kitchen tensors: one layout for per-tensor scales, one for per-channel scales.

The stock FP8 layout supports neither Conv2d nor per-channel scales on a GPU; the tensor class stays the stock
one, because ComfyUI recognizes quantized tensors by its name. Older ComfyUI requantizes (LoRA) by the layout's
name alone, hence one name for each granularity.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import comfy.float
import torch
from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor, get_layout_class, register_layout_class
from comfy_kitchen.tensor.base import BaseLayoutParams, QuantizedLayout

from ...hswq_core.quant.grid import FLOAT8_E4M3FN, by_channel, largest_of_channels
from ..comfyui.tensors import codes_of, scale_of

if TYPE_CHECKING:
    from ..comfyui.types import StateDict

LAYOUT = "HSWQFloat8Layout"
LAYOUT_PER_CHANNEL = "HSWQFloat8ChannelLayout"
STOCK_LAYOUT = str(QUANT_ALGOS[FLOAT8_E4M3FN.name]["comfy_tensor_layout"])


class HSWQFloat8Layout(QuantizedLayout):
    """codes · scale; scale float32 [] or, per channel, [out, 1...]."""

    MIN_SM_VERSION = None
    PER_CHANNEL = False

    @dataclass(frozen=True)
    class Params(BaseLayoutParams):
        """scale, orig_dtype, orig_shape."""

    @classmethod
    def quantize(
        cls,
        tensor: torch.Tensor,
        scale: torch.Tensor | str | None = None,
        stochastic_rounding: int = 0,
        **_: object,
    ) -> tuple[torch.Tensor, Params]:
        """Requantize a patched weight; a ``scale`` that is not a tensor ("recalculate") means amax / 448."""
        weight = tensor.to(torch.float32)
        if not isinstance(scale, torch.Tensor):
            scale = FLOAT8_E4M3FN.scale(cls._amax(weight))
        if stochastic_rounding:
            limited = (weight / scale).clamp_(-FLOAT8_E4M3FN.max, FLOAT8_E4M3FN.max)
            codes = comfy.float.stochastic_rounding(limited, FLOAT8_E4M3FN.dtype, seed=stochastic_rounding)
        else:
            codes = FLOAT8_E4M3FN.cast(weight / scale)
        return codes, cls.Params(scale=scale, orig_dtype=tensor.dtype, orig_shape=tuple(tensor.shape))

    @classmethod
    def _amax(cls, weight: torch.Tensor) -> torch.Tensor:
        return largest_of_channels(weight) if cls.PER_CHANNEL else weight.abs().amax()

    @classmethod
    def dequantize(cls, qdata: torch.Tensor, params: Params) -> torch.Tensor:
        """codes · scale in float32, rounded once to the dtype the model computes in."""
        return FLOAT8_E4M3FN.dequantize(qdata, params.scale, params.orig_dtype)

    @classmethod
    def get_plain_tensors(cls, qtensor: QuantizedTensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(codes, scale)."""
        return codes_of(qtensor), scale_of(qtensor)

    @classmethod
    def state_dict_tensors(cls, qdata: torch.Tensor, params: Params) -> StateDict:
        """Suffixes after ``X.weight``."""
        return {"": qdata, "_scale": params.scale}


class HSWQFloat8ChannelLayout(HSWQFloat8Layout):
    """One scale per output channel."""

    PER_CHANNEL = True


register_layout_class(LAYOUT, HSWQFloat8Layout)
register_layout_class(LAYOUT_PER_CHANNEL, HSWQFloat8ChannelLayout)


def quantized_weight(codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> tuple[QuantizedTensor, str]:
    """A QuantizedTensor and its layout's name.

    Args:
        codes: float8_e4m3fn, [out, in] or [out, in, kh, kw].
        scale: float32 with one element or one for each output channel.
        dtype: what ``dequantize`` returns.
    """
    per_channel = scale.numel() > 1
    scale = by_channel(scale.to(torch.float32), codes.dim()).to(codes.device)
    layout = HSWQFloat8ChannelLayout if per_channel else HSWQFloat8Layout
    name = LAYOUT_PER_CHANNEL if per_channel else LAYOUT
    params = layout.Params(scale=scale, orig_dtype=dtype, orig_shape=tuple(codes.shape))
    return QuantizedTensor(codes, name, params), name


def multiply_float8(
    x: torch.Tensor, weight: QuantizedTensor, bias: torch.Tensor | None, input_scale: torch.Tensor
) -> torch.Tensor:
    """x @ Wᵀ + bias with both factors in FP8, by the matmul that ComfyUI uses for its own FP8 layers.

    Args:
        x: [..., in].
        weight: QuantizedTensor [out, in] with one scale.
        bias: [out] or None.
        input_scale: float32 []; x is cast at x / input_scale.
    """
    params = get_layout_class(STOCK_LAYOUT).Params(
        scale=scale_of(weight), orig_dtype=x.dtype, orig_shape=tuple(weight.shape)
    )
    rows = QuantizedTensor.from_float(x.reshape(-1, x.shape[-1]), STOCK_LAYOUT, scale=input_scale)
    output = torch.nn.functional.linear(rows, QuantizedTensor(codes_of(weight), STOCK_LAYOUT, params), bias)
    return output.reshape(*x.shape[:-1], weight.shape[0])
