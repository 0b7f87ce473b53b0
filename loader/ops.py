"""ComfyUI operations whose Linear and Conv2d hold FP8 codes with a scale and dequantize at each call."""

from __future__ import annotations

from typing import Any

import comfy.float
import comfy.ops
import torch
from comfy.quant_ops import QuantizedTensor

from ..hswq_core import FLOAT8_E4M3FN
from ..hswq_core.formats import comfy_marker
from .layout import quantized_weight


class Float8Weight:
    """Mixed into Linear and Conv2d: an FP8 weight becomes a QuantizedTensor, any other goes the stock way.

    State-dict keys of a quantized layer X: ``X.weight`` float8_e4m3fn, ``X.weight_scale`` float32 (one
    element or one for each output channel; 1 if absent), ``X.comfy_quant`` (ignored), ``X.bias``.
    """

    compute_dtype: torch.dtype
    layout_type: str | None = None
    quant_format: str | None = None

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        metadata: Any,
        strict: bool,
        missing: list[str],
        unexpected: list[str],
        errors: list[str],
    ) -> None:
        scale = state_dict.pop(f"{prefix}weight_scale", None)
        state_dict.pop(f"{prefix}comfy_quant", None)
        state_dict.pop(f"{prefix}input_scale", None)
        weight = state_dict.get(f"{prefix}weight")
        if weight is None or weight.dtype != FLOAT8_E4M3FN.dtype:
            super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)  # type: ignore[misc]
            return
        del state_dict[f"{prefix}weight"]
        scale = torch.ones(()) if scale is None else scale
        current = getattr(self, "weight", None)
        codes = weight if current is None else weight.to(current.device)
        tensor, self.layout_type = quantized_weight(codes, scale, self.compute_dtype)
        self.quant_format = FLOAT8_E4M3FN.name
        self.weight = torch.nn.Parameter(tensor, requires_grad=False)
        torch.nn.Module._load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors)  # type: ignore[arg-type]
        if f"{prefix}weight" in missing:
            missing.remove(f"{prefix}weight")

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", **kwargs: Any) -> Any:
        """comfy keys for a quantized layer, so that stock Save nodes write a file HSWQ Loader opens again."""
        if self.layout_type is None:
            return super().state_dict(*args, destination=destination, prefix=prefix, **kwargs)  # type: ignore[misc]
        destination = {} if destination is None else destination
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias
        destination.update(self.weight.state_dict(f"{prefix}weight"))
        destination[f"{prefix}comfy_quant"] = comfy_marker(FLOAT8_E4M3FN)
        return destination

    def forward(self, input: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Dequantize (LoRAs of a streamed model are added after that, exactly), then the layer's own operation."""
        if self.layout_type is None:
            return super().forward(input, *args, **kwargs)  # type: ignore[misc,no-any-return]
        comfy.ops.run_every_op()
        weight, bias, stream = comfy.ops.cast_bias_weight(self, input, offloadable=True, compute_dtype=input.dtype)
        plain = weight.dequantize() if isinstance(weight, QuantizedTensor) else weight
        output = self._apply_weight(input, plain.to(input.dtype), bias)
        comfy.ops.uncast_bias_weight(self, weight, bias, stream)
        return output

    def convert_weight(self, weight: Any, **_: Any) -> torch.Tensor:
        """ModelPatcher's hook before it patches a weight."""
        return weight.dequantize() if isinstance(weight, QuantizedTensor) else weight

    def set_weight(
        self,
        weight: torch.Tensor,
        inplace_update: bool = False,
        seed: int | None = None,
        return_weight: bool = False,
        **_: Any,
    ) -> Any:
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

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Re-wrap parameters after ``fn``: a QuantizedTensor cannot be moved in place."""
        if self.layout_type is None:
            return super()._apply(fn, recurse)  # type: ignore[misc]
        for key, parameter in self._parameters.items():  # type: ignore[attr-defined]
            if parameter is None:
                continue
            moved = fn(parameter)
            if not torch.is_inference_mode_enabled() and moved.is_inference():
                moved = moved.clone()
            self.register_parameter(key, torch.nn.Parameter(moved, requires_grad=False))  # type: ignore[attr-defined]
        return self


def float8_operations(dtype: torch.dtype) -> type:
    """An operations class for ``model_options["custom_operations"]``.

    Args:
        dtype: what quantized weights dequantize to, the dtype the model computes in.
    """

    class HSWQOperations(comfy.ops.manual_cast):  # type: ignore[misc]
        class Linear(Float8Weight, comfy.ops.manual_cast.Linear):  # type: ignore[misc]
            compute_dtype = dtype

            def _apply_weight(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
                return torch.nn.functional.linear(x, weight, bias)

        class Conv2d(Float8Weight, comfy.ops.manual_cast.Conv2d):  # type: ignore[misc]
            compute_dtype = dtype

            def _apply_weight(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
                return self._conv_forward(x, weight, bias)

    return HSWQOperations
