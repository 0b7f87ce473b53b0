"""Method ``nearest``: every layer rounded to the nearest code, no statistics. What stock FP8 files are made by."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..model.layer import Layer
from ..plan.formats import FileFormat
from ..plan.plan import SKIP, LayerPlan, Plan
from ..progress import Progress, each_of, no_progress
from ..quant.grid import FLOAT8_E4M3FN, Grid, largest
from .decide import not_quantized, require_finite, require_unquantized, round_to_nearest
from .exclusions import Exclusions

METHOD = "nearest"


def plan_nearest(
    layers: list[Layer],
    read: Callable[[Layer], torch.Tensor],
    *,
    exclusions: Exclusions,
    file_format: FileFormat,
    grid: Grid = FLOAT8_E4M3FN,
    progress: Progress = no_progress,
) -> Plan:
    """Scale max|w| / 448 where the format stores one, a plain cast where it does not.

    Args:
        layers: every Linear and Conv2d of the model, in model order.
        read: the weight of a layer, any device.
        progress: called as (step, bytes done, bytes in all) before each layer; may raise to cancel.

    Raises:
        LayerError: a layer already in FP8, or with NaN or infinity.
    """
    excluded = exclusions.reasons(layers, {})

    def decide(layer: Layer) -> LayerPlan:
        require_unquantized(layer)
        if layer.name in excluded:
            return not_quantized(layer, SKIP, excluded[layer.name])
        w = read(layer)
        require_finite(layer, w)
        return round_to_nearest(layer, w, largest(w), "nearest", file_format, grid)

    plans = tuple(decide(layer) for layer in each_of(layers, "Rounding", progress))
    plan = Plan(file_format.name, METHOD, "", exclusions.family.name, grid.name, plans)
    plan.require_closed(len(layers))
    return plan
