"""The decision about one layer once its clip limit is known, and checks on weights common to all methods."""

from __future__ import annotations

import math

import torch

from ..errors import LayerError
from ..model.layer import Layer
from ..plan.formats import FileFormat
from ..plan.plan import KEEP, QUANTIZE, LayerPlan
from ..quant.grid import largest
from ..quant.metrics import error_to_db, relative_error_of
from ..quant.schemes.scheme import Scheme
from ..quant.schemes.table import holds_codes, scheme_named


def require_unquantized(layer: Layer) -> None:
    """Raise LayerError for an FP8 source."""
    if holds_codes(layer.dtype):
        raise already_quantized(
            layer.name,
            f"{layer.dtype}, already FP8",
            "Convert from the original FP16/BF16 file; a second quantization only adds error.",
        )


def already_quantized(layer: str, got: str, remedy: str) -> LayerError:
    """The error for a layer that is already quantized and so cannot be measured or quantized."""
    return LayerError(f"Layer {layer}, weight", got=got, expected="float16, bfloat16 or float32", remedy=remedy)


def require_finite(layer: Layer, w: torch.Tensor) -> None:
    """Raise LayerError for NaN, infinity and values beyond float32."""
    if w.numel() and not largest(w) <= torch.finfo(torch.float32).max:
        raise LayerError(
            f"Layer {layer.name}, weight",
            got="NaN or infinity in float32",
            expected="finite weights",
            remedy="The source file is damaged; download or merge it again.",
        )


def not_quantized(layer: Layer, action: str, reason: str) -> LayerPlan:
    """Plan of a kept or skipped layer."""
    return LayerPlan(layer.name, layer.kind, layer.shape, action, reason)


def quantized(layer: Layer, reason: str, scheme: Scheme, amax: float, sqnr: float) -> LayerPlan:
    """Plan of a quantized layer; ``sqnr``: of its weight in dB, infinite if the codes are exact."""
    plan = LayerPlan(layer.name, layer.kind, layer.shape, QUANTIZE, reason, scheme.name, amax)
    return plan if math.isinf(sqnr) else plan.measured(sqnr_db=sqnr)


def round_to_nearest(layer: Layer, w: torch.Tensor, amax: float, reason: str, file_format: FileFormat) -> LayerPlan:
    """Round to nearest with the format's default scheme and clip limit ``amax``; keep the layer if that loses too much.

    Args:
        w: finite weights.
    """
    scheme = file_format.usual(layer.kind)
    sqnr = rounded_sqnr_db(w, scheme, amax)
    if scheme.judged_against and math.isfinite(file_format.max_loss_db):
        loss = rounded_sqnr_db(w, scheme_named(scheme.judged_against), largest(w)) - sqnr
        if loss > file_format.max_loss_db:
            return not_quantized(layer, KEEP, f"unscaled {layer.kind} would lose over {file_format.max_loss_db:g} dB")
    return quantized(layer, reason, scheme, amax, sqnr)


def rounded_sqnr_db(w: torch.Tensor, scheme: Scheme, amax: float) -> float:
    """SQNR of ``w`` rounded to nearest with clip limit ``amax``, in dB; in pieces, which is 5 times as fast."""
    parts = scheme.steps(w, amax).pieces(w)
    return error_to_db(relative_error_of((piece, scheme.rounded(piece, steps)) for piece, steps in parts))
