"""Method ``hswq``, faithful to the original: keep the layers of largest output variance, clip-search the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from ..calibration.observer import LayerStats
from ..calibration.session import Session
from ..errors import LayerError, SettingError
from ..model.layer import Layer
from ..plan.formats import FileFormat
from ..plan.plan import KEEP, SKIP, LayerPlan, Plan
from ..progress import Progress, each_of, no_progress
from ..quant.clip_search import importance_over_weight, search_amax
from ..quant.grid import FLOAT8_E4M3FN, Grid
from .decide import not_quantized, require_finite, require_unquantized, round_to_nearest
from .exclusions import Exclusions

METHOD = "hswq"
DEFAULT_KEEP_RATIO = 0.25


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
    exclusions: Exclusions,
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
        progress: called as (step, bytes done, bytes in all) before each layer; may raise to cancel.

    Raises:
        LayerError: a layer without statistics, or already in FP8.
        SettingError: keep_ratio out of range.
    """
    check_keep_ratio(keep_ratio)
    stats = {layer.name: _require_stats(layer, session.layers) for layer in layers}
    excluded = exclusions.reasons(layers, stats)
    eligible = [layer.name for layer in layers if layer.name not in excluded]
    kept = keep_by_sensitivity({name: stats[name].sensitivity for name in eligible}, keep_ratio)
    plans = []
    for layer in each_of(layers, "Searching", progress):
        if layer.name in excluded:
            decided = not_quantized(layer, SKIP, excluded[layer.name])
        elif layer.name in kept:
            decided = not_quantized(layer, KEEP, "high sensitivity")
        else:
            decided = quantize_layer(layer, read(layer), stats[layer.name], file_format, grid)
        plans.append(replace(decided, sensitivity=stats[layer.name].sensitivity))
    plan = Plan(file_format.name, METHOD, f"{keep_ratio:g}", exclusions.family.name, grid.name, tuple(plans))
    plan.require_closed(len(layers))
    return plan


def keep_by_sensitivity(sensitivity: Mapping[str, float], keep_ratio: float) -> set[str]:
    """Names of the int(n · keep_ratio) largest sensitivities; equal ones in order of name."""
    ranked = by_sensitivity(sensitivity)
    return set(ranked[: int(len(ranked) * keep_ratio)])


def by_sensitivity(sensitivity: Mapping[str, float]) -> list[str]:
    """Names, the most sensitive first, equal ones in order of name."""
    return sorted(sensitivity, key=lambda name: (-sensitivity[name], name))


def quantize_layer(layer: Layer, w: torch.Tensor, stats: LayerStats, file_format: FileFormat, grid: Grid) -> LayerPlan:
    """Clip search for one layer; a layer an unscaled cast would hurt is kept where the format allows."""
    require_finite(layer, w)
    importance = importance_over_weight(layer.name, layer.shape, stats.importance).to(w.device)
    clip = search_amax(w, importance, grid, scaled=file_format.scaled(layer.kind))
    return round_to_nearest(layer, w, clip.amax, "clip search", file_format, grid)


def _require_stats(layer: Layer, stats: Mapping[str, LayerStats]) -> LayerStats:
    require_unquantized(layer)
    found = stats.get(layer.name)
    if found is None or found.shape != layer.shape:
        raise LayerError(
            f"Layer {layer.name}, statistics",
            got="none" if found is None else f"statistics of a weight of shape {found.shape}",
            expected=f"statistics of a weight of shape {layer.shape}",
            remedy="Calibrate this model under a new session name, then convert again.",
        )
    return found
