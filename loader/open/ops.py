"""ComfyUI operations whose Linear and Conv2d hold FP8 codes with a scale and dequantize at each call."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, cast

import comfy.float
import comfy.ops
import torch
from comfy.quant_ops import QuantizedTensor

from ...hswq_core.plan.formats import comfy_marker
from ...hswq_core.quant.grid import FLOAT8_E4M3FN
from ..comfyui.layers import LayerBase, changes_at_calls, is_cast_forced
from ..comfyui.tensors import marked_as_parameter, scale_of
from .layout import LAYOUT, multiply_float8, quantized_weight

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..comfyui.types import StateDict


@dataclass
class Loaded:
    """What the layers of a model have loaded.

    Attributes:
        scaled: prefixes of the layers that have loaded a scale.
        float8: how many layers have an FP8 weight.
        plain: how many have another weight, or none.
    """

    scaled: list[str] = field(default_factory=list)
    float8: int = 0
    plain: int = 0


class Float8Operations(Protocol):
    """An operations class for ``model_options["custom_operations"]``."""

    loaded: Loaded


class Float8Weight(LayerBase):
    """Mixed into Linear and Conv2d: an FP8 weight becomes a QuantizedTensor, any other loads the stock way.

    State-dict keys of a quantized layer X: ``X.weight`` float8_e4m3fn, ``X.weight_scale`` float32 (one
    element or one for each output channel; 1 if absent), ``X.input_scale`` float32 [] where inputs may be cast to FP8
    too, ``X.comfy_quant`` (ignored), ``X.bias``.

    Attributes:
        dtype: nominal dtype of a quantized weight; each call dequantizes to the dtype of its input.
        fast: multiply in FP8 where there is an input scale.
        loaded: shared by all layers of a model.
    """

    dtype: torch.dtype
    fast: bool
    loaded: Loaded
    layout_type: str | None = None

    def _load_from_state_dict(
        self,
        state_dict: StateDict,
        prefix: str,
        metadata: dict[str, Any],
        strict: bool,
        missing: list[str],
        unexpected: list[str],
        errors: list[str],
    ) -> None:
        scale = state_dict.pop(f"{prefix}weight_scale", None)
        state_dict.pop(f"{prefix}comfy_quant", None)
        input_scale = state_dict.pop(f"{prefix}input_scale", None)
        weight = state_dict.get(f"{prefix}weight")
        if weight is None or weight.dtype != FLOAT8_E4M3FN.dtype:
            self.loaded.plain += 1
            super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
            return
        del state_dict[f"{prefix}weight"]
        self.loaded.float8 += 1
        if scale is None:
            scale = torch.ones(())
        else:
            self.loaded.scaled.append(prefix)
        current = getattr(self, "weight", None)
        codes = weight if current is None else weight.to(current.device)
        tensor, self.layout_type = quantized_weight(codes, scale, self.dtype)
        self.weight = marked_as_parameter(tensor)
        torch.nn.Module._load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors)
        if f"{prefix}weight" in missing:
            missing.remove(f"{prefix}weight")
        if input_scale is not None:
            kept = input_scale.to(codes.device, torch.float32).reshape(())
            self.input_scale = torch.nn.Parameter(kept, requires_grad=False)

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", **kwargs: Any) -> Any:
        """comfy keys for a quantized layer, so that stock Save nodes write a file HSWQ Loader opens again."""
        if self.layout_type is None:
            return super().state_dict(*args, destination=destination, prefix=prefix, **kwargs)
        destination = {} if destination is None else destination
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias
        destination.update(self._quantized.state_dict(f"{prefix}weight"))
        destination[f"{prefix}comfy_quant"] = self.comfy_quant
        if self._input_scale is not None:
            destination[f"{prefix}input_scale"] = self._input_scale
        return destination

    @property
    def _quantized(self) -> QuantizedTensor:
        """``weight`` of a quantized layer."""
        return cast(QuantizedTensor, self.weight)

    @property
    def _input_scale(self) -> torch.Tensor | None:
        """Parameter ``input_scale`` if there is one; a class attribute of that name would keep it from registering."""
        return getattr(self, "input_scale", None)

    @property
    def weight_scale(self) -> torch.Tensor:
        """A quantized layer's scale: merging nodes look up every key of the state dict as an attribute."""
        if self.layout_type is None:
            raise AttributeError("weight_scale")
        return scale_of(self._quantized)

    @property
    def comfy_quant(self) -> torch.Tensor:
        """ComfyUI's marker of a quantized layer; see ``weight_scale``."""
        if self.layout_type is None:
            raise AttributeError("comfy_quant")
        full = self._input_scale is None
        return comfy_marker({"format": FLOAT8_E4M3FN.name, "full_precision_matrix_mult": full})

    def forward(self, input: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Dequantize, add what LoRAs add at each call, then the layer's own operation."""
        if self.layout_type is None:
            return super().forward(input, *args, **kwargs)
        comfy.ops.run_every_op()
        multiply = self._multiplies_float8()
        dtype = self.weight.dtype if multiply else input.dtype  # its own dtype leaves the weight quantized
        weight, bias, stream = comfy.ops.cast_bias_weight(
            self, input, dtype=dtype, bias_dtype=input.dtype, offloadable=True, compute_dtype=input.dtype
        )
        if multiply:
            scale = comfy.model_management.cast_to_device(self._input_scale, input.device, None)
            output = multiply_float8(input, weight, bias, scale)
        else:
            plain = weight.dequantize() if isinstance(weight, QuantizedTensor) else weight
            output = self._apply_weight(input, plain, bias)
        comfy.ops.uncast_bias_weight(self, weight, bias, stream)
        return output

    def _apply_weight(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The layer's own operation."""
        raise NotImplementedError

    def _multiplies_float8(self) -> bool:
        """Decided as in ComfyUI: LoRAs, a requested compute dtype or per-channel scales require dequantizing."""
        if not self.fast or self._input_scale is None or self.layout_type != LAYOUT:
            return False
        return not changes_at_calls(self) and not is_cast_forced(self)

    def convert_weight(self, weight: torch.Tensor, **_: object) -> torch.Tensor:
        """ModelPatcher's hook before it patches a weight."""
        return weight.dequantize() if isinstance(weight, QuantizedTensor) else weight

    def set_weight(
        self,
        weight: torch.Tensor,
        inplace_update: bool = False,
        seed: int | None = None,
        return_weight: bool = False,
        **_: object,
    ) -> torch.Tensor | None:
        """ModelPatcher's hook after it patched a weight.

        Quantized layers are requantized at amax / 448 with stochastic rounding, as the stock loader does; other
        layers are rounded to their own dtype.
        """
        if self.layout_type is not None:
            tensor = QuantizedTensor.from_float(
                weight, self.layout_type, scale="recalculate", stochastic_rounding=seed or 0
            )
            patched = tensor.to(self.weight.dtype)
        else:
            patched = comfy.float.stochastic_rounding(weight, self.weight.dtype, seed=seed or 0)
        if return_weight:
            return patched
        if inplace_update and self.layout_type is None:
            self.weight.data.copy_(patched)
        else:
            self.weight = torch.nn.Parameter(patched, requires_grad=False)
        return None

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Float8Weight:
        """Re-wrap parameters after ``fn``: a QuantizedTensor cannot be moved in place."""
        if self.layout_type is None:
            return super()._apply(fn, recurse)
        for key, parameter in self._parameters.items():
            if parameter is None:
                continue
            moved = fn(parameter)
            if not torch.is_inference_mode_enabled() and moved.is_inference():
                moved = moved.clone()
            self.register_parameter(key, torch.nn.Parameter(moved, requires_grad=False))
        return self


def float8_operations(storage: torch.dtype, *, multiply: bool) -> type[Float8Operations]:
    """An operations class for ``model_options["custom_operations"]``. Its ``loaded``: see ``Float8Weight``.

    Args:
        storage: dtype of the layers that are not FP8.
        multiply: multiply in FP8 where the file has an input scale.
    """
    counts = Loaded()

    class HSWQOperations(comfy.ops.manual_cast):
        loaded = counts

        class Linear(Float8Weight, comfy.ops.manual_cast.Linear):
            dtype, fast, loaded = storage, multiply, counts

            def _apply_weight(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
                return torch.nn.functional.linear(x, weight, bias)

        class Conv2d(Float8Weight, comfy.ops.manual_cast.Conv2d):
            dtype, fast, loaded = storage, False, counts

            def _apply_weight(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
                return self._conv_forward(x, weight, bias)

    return HSWQOperations
