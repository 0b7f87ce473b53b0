"""Ways to spend the same bytes, judged by the model's output on unseen calls."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from ...hswq_core.methods.decide import not_quantized
from ...hswq_core.methods.exclusions import NEVER_CALLED
from ...hswq_core.methods.hswq import by_sensitivity
from ...hswq_core.methods.solve import NEAREST, UNSOLVED, Solution
from ...hswq_core.plan.budget import choose_kept, fitting
from ...hswq_core.plan.plan import DAMPING, DEAD, KEEP, QUANTIZE, SKIP, LayerPlan, Plan
from ...hswq_core.progress import Progress, Step
from ...hswq_core.quant.metrics import error_to_db
from ..replay.replay import Replay
from .rounder import CAST, SOLVED, Rounder

log = logging.getLogger(__name__)

METHOD = "model_aware"
# Layer names listed in a report.
NAMES_TOLD = 5


@dataclass(frozen=True)
class Candidate:
    """Which layers stay in 16 bits, and how the others are rounded (see ``Rounder``)."""

    name: str
    how: str
    kept: frozenset[str]
    reason: str


@dataclass(frozen=True)
class Outcome:
    """The plan to write.

    Attributes:
        plan: the best candidate's.
        solutions: for its layers that are not rounded to nearest.
        errors: {candidate: mean squared relative change of the model's output on unseen calls}.
        best: the candidate with the smallest error.
        fast: line for the report about 8-bit multiplication; empty if not requested.
    """

    plan: Plan
    solutions: Mapping[str, Solution]
    errors: dict[str, float]
    best: Candidate
    fast: str = ""

    def notes(self) -> tuple[str, ...]:
        """Lines for the report."""
        quantized = [layer for layer in self.plan.layers if layer.action == QUANTIZE]
        how = Counter(layer.reason for layer in quantized)
        decibels = ", ".join(f"{name} {error_to_db(error**0.5):.1f} dB" for name, error in self.errors.items())
        lines = [
            f"rounded: {', '.join(f'{n} {name}' for name, n in sorted(how.items()))}",
            f"model output on unseen calls: {decibels}",
        ]
        damping = {layer.name: layer.numbers[DAMPING] for layer in quantized if DAMPING in layer.numbers}
        if damping:
            most = max(damping, key=lambda name: damping[name])
            lines.append(f"largest damping: {damping[most]:.2g} ({most})")
        dead = [int(layer.numbers[DEAD]) for layer in quantized if DEAD in layer.numbers]
        if dead:
            lines.append(f"inputs that calibration never reached: {sum(dead)} in {len(dead)} layers")
        unsolved = [layer.name for layer in quantized if layer.reason == UNSOLVED]
        if unsolved:
            lines.append(
                f"memory ran out for {len(unsolved)} layers, which are rounded without regard to their inputs: "
                f"{', '.join(unsolved[:NAMES_TOLD])}. Close other programs and convert again."
            )
        if self.best.how != SOLVED:
            lines.append(f"{self.best.name} did better than {METHOD} and is what was written.")
        return (*lines, *([self.fast] if self.fast else []))


def candidates(rounder: Rounder, change: Mapping[str, float], budget: int) -> list[Candidate]:
    """Ours first, then what other methods would do with the same bytes.

    Args:
        change: {layer: change of the model's output with only that layer rounded}.
        budget: bytes for layers that stay in 16 bits.
    """
    cost = {name: rounder.cost(name) for name in change}
    sensitivity = {name: rounder.job.session.layers[name].sensitivity for name in change}
    ours = frozenset(choose_kept(change, cost, budget))
    theirs = frozenset(fitting(by_sensitivity(sensitivity), cost, budget))
    scaled = rounder.encoding.file_format.scaled_kinds()
    castable = any(rounder.encoding.usual(kind).plain_limit for kind in scaled)
    cast = [Candidate("plain cast", CAST, frozenset(), "")] if castable else []
    return [
        Candidate(METHOD, SOLVED, ours, "large change of the output"),
        Candidate("hswq", NEAREST, theirs, "high sensitivity"),  # without its clip search, which is worth 0.1 dB
        Candidate("nearest", NEAREST, frozenset(), ""),
        *cast,
    ]


def best_of(
    rounder: Rounder,
    contenders: list[Candidate],
    replay: Replay,
    change: Mapping[str, float],
    budget: str,
    progress: Progress,
) -> Outcome:
    """Run each candidate, and plan by the one that changes the model's output least.

    Args:
        replay: of unseen calls, to which nothing was fitted.
        budget: what the user asked for, as it appears in the file name.
        progress: called as (step, done, total); may raise to cancel.
    """
    reference = replay.run()
    errors: dict[str, float] = {}
    for one in contenders:
        progress(Step("Verifying", one.name), len(errors), len(contenders))
        names = [name for name in change if name not in one.kept]
        errors[one.name] = replay.change(reference, {name: partial(rounder.delta, name, one.how) for name in names})
    best = min(contenders, key=lambda one: errors[one.name])
    if best.how != SOLVED:
        log.warning("HSWQ: %s did better than %s on unseen calls (%s).", best.name, METHOD, errors)
    plan = plan_of(rounder, best, change, budget)
    solutions = rounder.solutions if best.how == SOLVED else {}
    return Outcome(plan, solutions, errors, best)


def plan_of(rounder: Rounder, chosen: Candidate, change: Mapping[str, float], budget: str) -> Plan:
    """The plan of one candidate; layers without a ``change`` were never called."""
    job = rounder.job

    def decide(name: str) -> LayerPlan:
        if name not in change:
            return not_quantized(job.by_name[name], SKIP, NEVER_CALLED)
        if name in chosen.kept:
            return not_quantized(job.by_name[name], KEEP, chosen.reason)
        return rounder.row(name, chosen.how)

    layers = tuple(decide(name).measured(change=change.get(name)) for name in job.by_name)
    plan = Plan(rounder.encoding.file_format.name, METHOD, budget, job.info.family.name, layers)
    plan.require_closed(len(job.layers))
    return plan
