"""Method ``hswq``, faithful to the original: keep the layers with the largest output variance, clip-search the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..calibration.observer import LayerStats
from ..errors import LayerError, SettingError
from ..model.layer import Layer
from ..plan.formats import FileFormat
from ..plan.plan import KEEP, SKIP, LayerPlan, Plan
from ..progress import each_of
from ..quant.clip_search import importance_over_weight, search_amax
from .decide import not_quantized, require_finite, require_unquantized, round_to_nearest
from .method import SESSION, Method, NoBudget, Planned, Task, require_session

DEFAULT_KEEP_RATIO = 0.25


@dataclass(frozen=True)
class HSWQSettings(NoBudget):
    """Settings of method ``hswq``.

    Attributes:
        keep_ratio: share of the eligible layers to keep, the int(n · keep_ratio) most sensitive.

    Raises:
        SettingError: out of range.
    """

    keep_ratio: float = DEFAULT_KEEP_RATIO

    def __post_init__(self) -> None:
        if not 0.0 <= self.keep_ratio <= 1.0:
            raise SettingError(
                "keep_ratio", got=self.keep_ratio, expected="0 to 1", remedy="0.25 is HSWQ's usual value."
            )

    @property
    def text(self) -> str:
        """As it appears in file names: ``0.25``."""
        return f"{self.keep_ratio:g}"


def plan_hswq(task: Task, settings: HSWQSettings) -> Planned:
    """Decide about every layer.

    Raises:
        SettingError: no session.
        LayerError: a layer without statistics, or already in FP8.
    """
    session = require_session(HSWQ.name, task.session)
    stats = {layer.name: _require_stats(layer, session.layers) for layer in task.layers}
    excluded = task.exclusions.reasons(task.layers, stats)
    eligible = [layer.name for layer in task.layers if layer.name not in excluded]
    kept = keep_by_sensitivity({name: stats[name].sensitivity for name in eligible}, settings.keep_ratio)
    file_format = task.encoding.file_format

    def decide(layer: Layer) -> LayerPlan:
        if layer.name in excluded:
            return not_quantized(layer, SKIP, excluded[layer.name])
        if layer.name in kept:
            return not_quantized(layer, KEEP, "high sensitivity")
        return quantize_layer(layer, task.read(layer), stats[layer.name], file_format)

    layers = tuple(
        decide(layer).measured(sensitivity=stats[layer.name].sensitivity)
        for layer in each_of(task.layers, "Searching", task.progress)
    )
    plan = Plan(file_format.name, HSWQ.name, settings.text, task.exclusions.family.name, layers)
    plan.require_closed(len(task.layers))
    return Planned(plan)


def keep_by_sensitivity(sensitivity: Mapping[str, float], keep_ratio: float) -> set[str]:
    """Names with the int(n · keep_ratio) largest sensitivities, ties by name."""
    ranked = by_sensitivity(sensitivity)
    return set(ranked[: int(len(ranked) * keep_ratio)])


def by_sensitivity(sensitivity: Mapping[str, float]) -> list[str]:
    """Names by descending sensitivity, ties by name."""
    return sorted(sensitivity, key=lambda name: (-sensitivity[name], name))


def quantize_layer(layer: Layer, w: torch.Tensor, stats: LayerStats, file_format: FileFormat) -> LayerPlan:
    """Clip-search one layer; keep it if an unscaled cast would lose more than the format allows."""
    require_finite(layer, w)
    importance = importance_over_weight(layer.name, layer.shape, stats.importance).to(w.device)
    clip = search_amax(w, importance, file_format.usual(layer.kind))
    return round_to_nearest(layer, w, clip.amax, "clip search", file_format)


def _require_stats(layer: Layer, stats: Mapping[str, LayerStats]) -> LayerStats:
    require_unquantized(layer)
    layer_stats = stats.get(layer.name)
    if layer_stats is None or layer_stats.shape != layer.shape:
        raise LayerError(
            f"Layer {layer.name}, statistics",
            got="none" if layer_stats is None else f"statistics of a weight of shape {layer_stats.shape}",
            expected=f"statistics of a weight of shape {layer.shape}",
            remedy="Calibrate this model under a new session name, then convert again.",
        )
    return layer_stats


HSWQ = Method("hswq", plan_hswq, needs=frozenset({SESSION}), settings=HSWQSettings)
