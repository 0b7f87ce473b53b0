"""Which layers may multiply in 8 bits: their inputs are cast too, with the scale that calibration measured.

FP8 inputs lose more than compensated FP8 weights do, and not equally in every layer. How casting a layer's inputs
changes its own output is measured in one pass over a few states; how much of such an error reaches the model's output
is known from probing. Layers are taken in order of that change per multiplication saved, as many as the loss the user
allows. That loss is measured with all of them at once: predictions for single layers add up to half of it at best.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch.nn import functional

from ...hswq_core.plan.plan import QUANTIZE
from ...hswq_core.progress import Progress, Step
from ...hswq_core.quant.metrics import error_to_db
from ..replay.replay import Output, Replay
from .candidates import Outcome
from .rounder import SOLVED, Rounder

# Other prompts give larger inputs than any that calibration saw; on a floating-point grid a factor of two costs only
# the smallest values.
INPUT_MARGIN = 2.0


@dataclass(frozen=True)
class Seen:
    """What casting the inputs of one layer does.

    Attributes:
        error: squared relative change of the layer's output with its inputs cast.
        products: multiplications in its calls.
    """

    error: float
    products: int


def speeded(
    outcome: Outcome,
    rounder: Rounder,
    gain: Mapping[str, float],
    decide: Replay,
    verify: Replay,
    progress: Progress,
) -> Outcome:
    """``outcome`` with ``input_amax`` set where that is worth it.

    Args:
        gain: {layer: change of the model's output per squared error of the layer's own}.
        decide: states to choose by.
        verify: unseen states, to which nothing was fitted.
        progress: called as (step, done, total); may raise to cancel.
    """
    limits = {
        layer.name: INPUT_MARGIN * rounder.job.session.layers[layer.name].input_amax
        for layer in outcome.plan.layers
        if layer.action == QUANTIZE and layer.scaled
    }
    progress(Step("Casting", "inputs"), 0, 1)
    seen = measured(rounder, limits, decide)
    ranked = sorted(seen, key=lambda name: (gain[name] * seen[name].error / seen[name].products, name))
    trial = _Trial(outcome, rounder, limits, decide)
    allowed = 10 ** (rounder.encoding.fast_matmul / 10) * trial.change([])
    count = most(len(ranked), lambda count: trial.change(ranked[:count]) <= allowed, progress)
    return _with_inputs(outcome, replace(trial, replay=verify), ranked[:count], seen)


def most(total: int, holds: Callable[[int], bool], progress: Progress) -> int:
    """The largest count up to ``total`` that ``holds``, by bisection: 0 does, and beyond some count none does."""
    low, high, steps = 0, total, total.bit_length()
    while low < high:
        progress(Step("Casting", "inputs"), max(0, steps - (high - low).bit_length()), steps)
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def measured(rounder: Rounder, limits: Mapping[str, float], replay: Replay) -> dict[str, Seen]:
    """What casting inputs does to each layer's own output.

    Args:
        limits: {layer: clip limit of its inputs}.
    """
    changed, total, products = (dict.fromkeys(limits, 0.0) for _ in range(3))

    def see(name: str) -> Callable[[torch.Tensor], None]:
        def note(x: torch.Tensor) -> None:
            w = rounder.weight(name).to(x.device, x.dtype)
            cast = rounder.scheme(name, SOLVED).activations(x, limits[name])
            changed[name] += functional.linear(cast - x, w).square().sum(dtype=torch.float64).item()
            total[name] += functional.linear(x, w).square().sum(dtype=torch.float64).item()
            products[name] += x.numel() * len(w)

        return note

    replay.watch({name: see(name) for name in limits})
    return {name: Seen(changed[name] / total[name], int(products[name])) for name in limits if total[name] > 0}


@dataclass(frozen=True)
class _Trial:
    outcome: Outcome
    rounder: Rounder
    limits: Mapping[str, float]
    replay: Replay

    def change(self, fast: Sequence[str]) -> float:
        """Squared relative change of the model's output with these layers multiplying in 8 bits."""
        names = [layer.name for layer in self.outcome.plan.layers if layer.action == QUANTIZE]
        limits, how = {name: self.limits[name] for name in fast}, self.outcome.best.how
        deltas = {name: partial(self.rounder.delta, name, how, limits.get(name, 0.0)) for name in names}
        return self.replay.change(self.reference, deltas)

    @cached_property
    def reference(self) -> list[Output]:
        """The unchanged outputs."""
        return self.replay.run()


def _with_inputs(outcome: Outcome, verify: _Trial, fast: Sequence[str], seen: Mapping[str, Seen]) -> Outcome:
    limits = {name: verify.limits[name] for name in fast}
    layers = (replace(layer, input_amax=limits.get(layer.name, 0.0)) for layer in outcome.plan.layers)
    total = sum(one.products for one in seen.values())
    share = sum(seen[name].products for name in fast) / total if total else 0.0
    note = (
        f"fast matmul: {len(fast)} of {len(seen)} layers, {share:.0%} of their multiplications; model output on "
        f"unseen calls {error_to_db(verify.change(fast) ** 0.5):.1f} dB with it"
    )
    return replace(outcome, plan=replace(outcome.plan, layers=tuple(layers)), fast=note)
