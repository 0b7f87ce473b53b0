"""Which layers may multiply in 8 bits: their inputs cast too, with the scale that calibration measured.

FP8 inputs lose more than compensated FP8 weights do, and not in every layer as much. What casting its inputs does to a
layer's own output is measured in one pass over a few states; how much of such an error arrives at the model's output is
known from probing. Layers are taken in order of that change per multiplication saved, as many as the loss the user
allows, which is measured with all of them at once: predictions of single layers add up to half of it at best.
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

# Inputs of other prompts are larger than any that calibration met; on a floating grid a factor of two costs nothing
# but the smallest values.
INPUT_MARGIN = 2.0


@dataclass(frozen=True)
class Seen:
    """Of the inputs of one layer.

    Attributes:
        error: squared change of the layer's output with its inputs cast, relative.
        products: multiplications of its calls.
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
    """``outcome`` with ``input_amax`` where that is worth it.

    Args:
        gain: {layer: change of the model's output by squared error of its own}.
        decide: states to choose by.
        verify: states that nothing was fitted to.
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
    """The largest count up to ``total`` that ``holds``, by bisection: it does for 0, and less the larger it is."""
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
    changed, whole, products = (dict.fromkeys(limits, 0.0) for _ in range(3))

    def see(name: str) -> Callable[[torch.Tensor], None]:
        def note(x: torch.Tensor) -> None:
            w = rounder.weight(name).to(x.device, x.dtype)
            cast = rounder.scheme(name, SOLVED).activations(x, limits[name])
            changed[name] += functional.linear(cast - x, w).square().sum(dtype=torch.float64).item()
            whole[name] += functional.linear(x, w).square().sum(dtype=torch.float64).item()
            products[name] += x.numel() * len(w)

        return note

    replay.watch({name: see(name) for name in limits})
    return {name: Seen(changed[name] / whole[name], int(products[name])) for name in limits if whole[name] > 0}


@dataclass(frozen=True)
class _Trial:
    outcome: Outcome
    rounder: Rounder
    limits: Mapping[str, float]
    replay: Replay

    def change(self, fast: Sequence[str]) -> float:
        """Squared relative change of the model's output, with these layers multiplying in 8 bits."""
        names = [layer.name for layer in self.outcome.plan.layers if layer.action == QUANTIZE]
        limits, how = {name: self.limits[name] for name in fast}, self.outcome.best.how
        deltas = {name: partial(self.rounder.delta, name, how, limits.get(name, 0.0)) for name in names}
        return self.replay.change(self.reference, deltas)

    @cached_property
    def reference(self) -> list[Output]:
        """The outputs with nothing changed."""
        return self.replay.run()


def _with_inputs(outcome: Outcome, verify: _Trial, fast: Sequence[str], seen: Mapping[str, Seen]) -> Outcome:
    limits = {name: verify.limits[name] for name in fast}
    layers = (replace(layer, input_amax=limits.get(layer.name, 0.0)) for layer in outcome.plan.layers)
    whole = sum(one.products for one in seen.values())
    share = sum(seen[name].products for name in fast) / whole if whole else 0.0
    note = (
        f"fast matmul: {len(fast)} of {len(seen)} layers, {share:.0%} of their multiplications; model output on "
        f"unseen calls {error_to_db(verify.change(fast) ** 0.5):.1f} dB with it"
    )
    return replace(outcome, plan=replace(outcome.plan, layers=tuple(layers)), fast=note)
