"""Method ``hswq``, faithful to the original: keep the layers of largest output variance, clip-search the rest."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from .errors import LayerError, SettingError
from .families import Family
from .formats import UNSCALED_CONV_MAX_LOSS_DB, FileFormat
from .grid import FLOAT8_DTYPES, FLOAT8_E4M3FN, Grid
from .importance import importance_over_weight
from .metrics import sqnr_db
from .observer import LayerStats
from .plan import KEEP, QUANTIZE, SKIP, Layer, LayerPlan, Plan, Progress, no_progress
from .search import largest, search_amax
from .session import Session

METHOD = "hswq"
# ComfyUI's dynamic VRAM requantizes modules of up to 16 KB at transfer, with a scale of its own: so many
# weights of one byte each.
TINY_WEIGHTS = 16 * 1024
NEVER_CALLED = "not used by the calibrated workflow"


def check_keep_ratio(keep_ratio: float) -> float:
    """``keep_ratio`` if 0 ≤ keep_ratio ≤ 1, else SettingError."""
    if not 0.0 <= keep_ratio <= 1.0:
        raise SettingError("keep_ratio", got=keep_ratio, expected="0 to 1", remedy="0.25 is HSWQ's usual value.")
    return keep_ratio


def plan_hswq(
    layers: list[Layer],
    session: Session,
    read: Callable[[Layer], torch.Tensor],
    *,
    family: Family,
    file_format: FileFormat,
    keep_ratio: float,
    grid: Grid = FLOAT8_E4M3FN,
    progress: Progress = no_progress,
) -> Plan:
    """Decide about every layer.

    Args:
        layers: every Linear and Conv2d of the model, in model order.
        session: statistics of the same model.
        read: the weight of a layer, any device.
        keep_ratio: share of the eligible layers kept in 16 bits, int(n · keep_ratio) of largest sensitivity.
        progress: called as (what, done, total) before each layer; may raise to cancel.

    Raises:
        LayerError: a layer without statistics, or already in FP8.
        SettingError: keep_ratio out of range.
    """
    check_keep_ratio(keep_ratio)
    stats = {layer.name: _require_stats(layer, session.layers) for layer in layers}
    fixed = {layer.name: reason for layer in layers if (reason := fixed_reason(layer, stats[layer.name], family))}
    eligible = [layer.name for layer in layers if layer.name not in fixed]
    kept = keep_by_sensitivity({name: stats[name].sensitivity for name in eligible}, keep_ratio)
    plans = []
    for i, layer in enumerate(layers):
        progress(f"Searching {layer.name}", i, len(layers))
        if layer.name in fixed:
            decided = _undecided(layer, SKIP, fixed[layer.name])
        elif layer.name in kept:
            decided = _undecided(layer, KEEP, "high sensitivity")
        else:
            decided = quantize_layer(layer, read(layer), stats[layer.name], file_format, grid)
        plans.append(replace(decided, sensitivity=stats[layer.name].sensitivity))
    plan = Plan(file_format.name, METHOD, f"{keep_ratio:g}", family.name, grid.name, tuple(plans))
    plan.require_closed(len(layers))
    return plan


def keep_by_sensitivity(sensitivity: Mapping[str, float], keep_ratio: float) -> set[str]:
    """Names of the int(n · keep_ratio) largest sensitivities; equal ones in order of name."""
    ranked = sorted(sensitivity, key=lambda name: (-sensitivity[name], name))
    return set(ranked[: int(len(ranked) * keep_ratio)])


def fixed_reason(layer: Layer, stats: LayerStats, family: Family) -> str | None:
    """Why ``layer`` is never quantized, or None if it may be."""
    if math.prod(layer.shape) <= TINY_WEIGHTS:
        return f"at most {TINY_WEIGHTS // 1024} K weights"
    if stats.in_calls == 0:
        return NEVER_CALLED
    return family.never_reason(layer.name)


def quantize_layer(layer: Layer, w: torch.Tensor, stats: LayerStats, file_format: FileFormat, grid: Grid) -> LayerPlan:
    """Clip search for one layer; a layer an unscaled cast would hurt is kept where the format allows."""
    w = w.to(torch.float32)
    if not bool(w.isfinite().all()):
        raise LayerError(
            f"Layer {layer.name}, weight",
            got="NaN or infinity",
            expected="finite weights",
            remedy="The source file is damaged; download or merge it again.",
        )
    importance = importance_over_weight(layer.name, layer.shape, stats.importance).to(w.device)
    scaled = file_format.scaled(layer.kind)
    clip = search_amax(w, importance, grid, scaled=scaled)
    sqnr = sqnr_db(w, grid.fake_quantize(w, clip.amax, scaled=scaled))
    if file_format.may_keep_unscaled and not scaled:
        loss = sqnr_db(w, grid.fake_quantize(w, largest(w), scaled=True)) - sqnr
        if loss > UNSCALED_CONV_MAX_LOSS_DB:
            return _undecided(layer, KEEP, f"unscaled {layer.kind} would lose over {UNSCALED_CONV_MAX_LOSS_DB:g} dB")
    exact = math.isinf(sqnr)
    return LayerPlan(
        layer.name, layer.kind, layer.shape, QUANTIZE, "clip search", scaled, clip.amax, sqnr_db=None if exact else sqnr
    )


def _require_stats(layer: Layer, stats: Mapping[str, LayerStats]) -> LayerStats:
    if layer.dtype in FLOAT8_DTYPES:
        raise LayerError(
            f"Layer {layer.name}, weight",
            got=f"{layer.dtype}, already FP8",
            expected="float16, bfloat16 or float32",
            remedy="Convert from the original FP16/BF16 file; a second quantization only adds error.",
        )
    found = stats.get(layer.name)
    if found is None or found.shape != layer.shape:
        raise LayerError(
            f"Layer {layer.name}, statistics",
            got="none" if found is None else f"statistics of a weight of shape {found.shape}",
            expected=f"statistics of a weight of shape {layer.shape}",
            remedy="Calibrate this model under a new session name, then convert again.",
        )
    return found


def _undecided(layer: Layer, action: str, reason: str) -> LayerPlan:
    return LayerPlan(layer.name, layer.kind, layer.shape, action, reason)
