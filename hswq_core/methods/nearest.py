"""Method ``nearest``: round every layer to nearest, without statistics, as in stock FP8 files."""

from __future__ import annotations

from ..model.layer import Layer
from ..plan.plan import SKIP, LayerPlan, Plan
from ..progress import each_of
from ..quant.grid import largest
from .decide import not_quantized, require_finite, require_unquantized, round_to_nearest
from .method import Method, Planned, Task


def plan_nearest(task: Task, _settings: object = None) -> Planned:
    """Scale max|w| / 448 if the format stores a scale, else a plain cast.

    Raises:
        LayerError: a layer already in FP8, or with NaN or infinity.
    """
    excluded = task.exclusions.reasons(task.layers, {})
    file_format = task.encoding.file_format

    def decide(layer: Layer) -> LayerPlan:
        require_unquantized(layer)
        if layer.name in excluded:
            return not_quantized(layer, SKIP, excluded[layer.name])
        w = task.read(layer)
        require_finite(layer, w)
        return round_to_nearest(layer, w, largest(w), "nearest", file_format)

    layers = tuple(decide(layer) for layer in each_of(task.layers, "Rounding", task.progress))
    plan = Plan(file_format.name, NEAREST.name, "", task.exclusions.family.name, layers)
    plan.require_closed(len(task.layers))
    return Planned(plan)


NEAREST = Method("nearest", plan_nearest)
