"""The decision about one layer once its clip limit is known, and what every method asks of a weight."""

from __future__ import annotations

import math

import torch

from ..errors import LayerError
from ..model.layer import Layer
from ..plan.formats import UNSCALED_CONV_MAX_LOSS_DB, FileFormat
from ..plan.plan import KEEP, QUANTIZE, LayerPlan
from ..quant.grid import FLOAT8_DTYPES, Grid, largest, pieces
from ..quant.metrics import error_to_db, relative_error_of


def require_unquantized(layer: Layer) -> None:
    """Raise LayerError for an FP8 source."""
    if layer.dtype in FLOAT8_DTYPES:
        raise LayerError(
            f"Layer {layer.name}, weight",
            got=f"{layer.dtype}, already FP8",
            expected="float16, bfloat16 or float32",
            remedy="Convert from the original FP16/BF16 file; a second quantization only adds error.",
        )


def require_finite(layer: Layer, w: torch.Tensor) -> None:
    """Raise LayerError for NaN, infinity and what float32 cannot hold."""
    if w.numel() and not largest(w) <= torch.finfo(torch.float32).max:
        raise LayerError(
            f"Layer {layer.name}, weight",
            got="NaN or infinity in float32",
            expected="finite weights",
            remedy="The source file is damaged; download or merge it again.",
        )


def not_quantized(layer: Layer, action: str, reason: str) -> LayerPlan:
    """A layer that is kept or skipped."""
    return LayerPlan(layer.name, layer.kind, layer.shape, action, reason)


def round_to_nearest(
    layer: Layer, w: torch.Tensor, amax: float, reason: str, file_format: FileFormat, grid: Grid
) -> LayerPlan:
    """Quantized with clip limit ``amax``; kept where the format has no scale, allows it, and a cast would hurt.

    Args:
        w: finite weights.
    """
    scaled = file_format.scaled(layer.kind)
    sqnr = rounded_sqnr_db(w, amax, grid, scaled=scaled)
    if file_format.may_keep_unscaled and not scaled:
        loss = rounded_sqnr_db(w, largest(w), grid, scaled=True) - sqnr
        if loss > UNSCALED_CONV_MAX_LOSS_DB:
            return not_quantized(layer, KEEP, f"unscaled {layer.kind} would lose over {UNSCALED_CONV_MAX_LOSS_DB:g} dB")
    known = None if math.isinf(sqnr) else sqnr
    return LayerPlan(layer.name, layer.kind, layer.shape, QUANTIZE, reason, scaled, amax, sqnr_db=known)


def rounded_sqnr_db(w: torch.Tensor, amax: float, grid: Grid, *, scaled: bool) -> float:
    """SQNR of ``w`` rounded to nearest with clip limit ``amax``, in dB; piece by piece, which is 5 times as fast."""
    pairs = ((piece, grid.fake_quantize(piece, amax, scaled=scaled)) for piece in pieces(w))
    return error_to_db(relative_error_of(pairs))
