"""Method ``model_aware``: rounded and chosen by what each layer does to this model's own output.

1. Every layer is rounded with the second moments of its inputs, gathered group by group under a memory limit.
2. Each rounded layer alone is put into the model: the change of the output is what it costs to have it in 8 bits.
3. The budget keeps the layers of the largest change per byte.
4. The whole plan is run on states that nothing was fitted to, beside nearest rounding; the better one is written.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

from ..hswq_core import KEEP, QUANTIZE, SKIP, FileFormat, Grid, Layer, LayerPlan, Plan, Progress, SessionError
from ..hswq_core.budget import check_extra_percent, choose_kept
from ..hswq_core.exclusions import NEVER_CALLED
from ..hswq_core.gram import Moments
from ..hswq_core.metrics import error_to_db, sqnr_db
from ..hswq_core.rounding import not_quantized, require_unquantized
from ..hswq_core.solve import NEAREST, Solution, solve
from ..hswq_core.states import State
from .job import Job
from .moments import gather, in_groups, shared_inputs
from .replay import Delta, Output, Replay

log = logging.getLogger(__name__)

METHOD = "model_aware"
LEAST_STATES = 4
# Of the states: to round by; to decide and probe by; the rest to verify by.
FIT_SHARE, HELD_SHARE = 0.625, 0.1875


@dataclass(frozen=True)
class Verdict:
    """Squared relative change of the model's output on unseen states, all layers of a plan together."""

    ours: float
    nearest: float


@dataclass(frozen=True)
class Outcome:
    """A plan, what its quantized layers hold, and how well it did."""

    plan: Plan
    solutions: dict[str, Solution]
    verdict: Verdict

    def notes(self) -> tuple[str, ...]:
        """Lines for the report."""
        how = Counter(solution.how for solution in self.solutions.values())
        ours, nearest = (error_to_db(change**0.5) for change in (self.verdict.ours, self.verdict.nearest))
        return (
            f"rounded: {', '.join(f'{n} {name}' for name, n in sorted(how.items()))}",
            f"model output on unseen calls: {ours:.1f} dB, with nearest rounding {nearest:.1f} dB",
        )


def plan_model_aware(
    job: Job, states: list[State], *, file_format: FileFormat, grid: Grid, extra: float, progress: Progress
) -> Outcome:
    """Plan a conversion under a budget.

    Args:
        job: the opened MODEL.
        states: of the session, in order of key.
        extra: percent of bytes beyond a file with every layer in 8 bits.
        progress: called as (what, done, total); may raise to cancel.

    Raises:
        SessionError: too few states.
        SettingError: a budget out of range.
        LayerError: a layer with NaN, or already in FP8.
    """
    check_extra_percent(extra)
    for layer in job.layers:
        require_unquantized(layer)
    method = _Method(job, split_states(states), file_format, grid, progress)
    with method.fit.loaded():
        return method.run(extra)


def split_states(states: list[State]) -> tuple[list[State], list[State], list[State]]:
    """(to round by, to decide by, to verify by); every one has some. Raises SessionError for too few."""
    if len(states) < LEAST_STATES:
        raise SessionError(
            "States of the session",
            got=f"{len(states)} model calls",
            expected=f"at least {LEAST_STATES}, better 32",
            remedy="Generate once more with the Calibration node, its states at 32, or choose method hswq.",
        )
    fit = max(2, round(FIT_SHARE * len(states)))
    held = max(1, round(HELD_SHARE * len(states)))
    return states[:fit], states[fit : fit + held], states[fit + held :]


class _Method:
    def __init__(
        self,
        job: Job,
        states: tuple[list[State], list[State], list[State]],
        file_format: FileFormat,
        grid: Grid,
        progress: Progress,
    ) -> None:
        self.job, self.format, self.grid, self.progress = job, file_format, grid, progress
        self.fit, self.held, self.verify = (Replay(job.model, part) for part in states)
        self.layers = {layer.name: layer for layer in job.layers}

    def run(self, extra: float) -> Outcome:
        leaders = shared_inputs(self.held, self.layers)
        solutions = self._solve(leaders)
        change = self._probe(solutions)
        kept = self._choose(change, extra)
        plan = self._plan(solutions, kept, extra)
        chosen = {name: solution for name, solution in solutions.items() if name not in kept}
        return self._verified(plan, chosen)

    # ----- 1. rounding

    def _solve(self, leaders: dict[str, str]) -> dict[str, Solution]:
        solutions: dict[str, Solution] = {}
        for group in in_groups(self.fit, dict.fromkeys(leaders.values())):
            fit, held = gather(self.fit, group), gather(self.held, group)
            for name in (name for name, leader in leaders.items() if leader in fit):
                self.progress(f"Rounding {name}", len(solutions), len(leaders))
                solutions[name] = self._solution(self.layers[name], fit[leaders[name]], held[leaders[name]])
        return solutions

    def _solution(self, layer: Layer, fit: Moments, held: Moments) -> Solution:
        w = self.job.read(layer)
        moments = [replace(m, gram=m.gram.to(w.device), mean=m.mean.to(w.device)) for m in (fit, held)]
        has_bias = f"{self.job.source.prefix}{layer.name}.bias" in self.job.source.entries
        scaled = self.format.scaled(layer.kind)
        found = solve(layer, w, *moments, scaled=scaled, grid=self.grid, has_bias=has_bias)
        bias = None if found.bias is None else found.bias.cpu()
        return replace(found, codes=found.codes.cpu(), bias=bias)

    # ----- 2. and 3. what to keep

    def _probe(self, solutions: dict[str, Solution]) -> dict[str, float]:
        reference = self.held.run()
        change = {}
        for done, (name, solution) in enumerate(solutions.items()):
            self.progress(f"Probing {name}", done, len(solutions))
            delta = self._delta(name, solution)
            change[name] = self.held.change(reference, {name: lambda delta=delta: delta})
        return change

    def _delta(self, name: str, solution: Solution) -> Delta:
        w = self.job.read(self.layers[name]).float()
        return Delta(solution.restored(self.grid, w.device) - w, solution.bias)

    def _choose(self, change: dict[str, float], extra: float) -> set[str]:
        """A weight in 16 bits takes a byte more than in 8."""
        cost = {layer.name: math.prod(layer.shape) for layer in self.job.layers}
        weights = {f"{self.job.source.prefix}{name}.weight" for name in cost}
        others = sum(entry.nbytes for key, entry in self.job.source.entries.items() if key not in weights)
        return choose_kept(change, cost, int((others + sum(cost.values())) * extra / 100))

    def _plan(self, solutions: dict[str, Solution], kept: set[str], extra: float) -> Plan:
        def decide(layer: Layer) -> LayerPlan:
            solution = solutions.get(layer.name)
            if solution is None:
                return not_quantized(layer, SKIP, NEVER_CALLED)
            if layer.name in kept:
                return not_quantized(layer, KEEP, "large change of the output")
            w = self.job.read(layer).float()
            return LayerPlan(
                layer.name,
                layer.kind,
                layer.shape,
                QUANTIZE,
                solution.how,
                solution.scaled,
                solution.amax,
                sqnr_db=sqnr_db(w, solution.restored(self.grid, w.device)),
            )

        plans = tuple(decide(layer) for layer in self.job.layers)
        plan = Plan(self.format.name, METHOD, f"{extra:g}", self.job.info.family.name, self.grid.name, plans)
        plan.require_closed(len(self.job.layers))
        return plan

    # ----- 4. the whole

    def _verified(self, plan: Plan, solutions: dict[str, Solution]) -> Outcome:
        reference = self.verify.run()
        ours = self._change(reference, solutions)
        plain = {name: self._nearest(name, solution) for name, solution in solutions.items()}
        nearest = self._change(reference, plain)
        if ours <= nearest:
            return Outcome(plan, solutions, Verdict(ours, nearest))
        log.warning("HSWQ: nearest rounding did better on unseen states (%.3g against %.3g).", nearest, ours)
        layers = tuple(replace(p, reason=NEAREST) if p.action == QUANTIZE else p for p in plan.layers)
        return Outcome(replace(plan, layers=layers), plain, Verdict(ours, nearest))

    def _change(self, reference: list[Output], solutions: Mapping[str, Solution]) -> float:
        return self.verify.change(reference, {name: partial(self._delta, name, s) for name, s in solutions.items()})

    def _nearest(self, name: str, solution: Solution) -> Solution:
        w = self.job.read(self.layers[name])
        codes, _ = self.grid.quantize(w, solution.amax, scaled=solution.scaled)
        return replace(solution, codes=codes.cpu(), how=NEAREST, bias=None, error=solution.nearest_error)
