"""What each part of ``model_aware`` is worth: its parts alone and together, at the same bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from judge.methods import Method
from judge.subject import Subject, open_hswq

EXTRA = 3.0
FORMAT = "v2"


@dataclass(frozen=True)
class Parts:
    """Which parts are on.

    Attributes:
        rounding: "nearest", "compensated", or "both": compensated with bias correction.
        kept: what the budget is spent by: "nothing", "variance" (HSWQ's), "own error" or "probe".
    """

    rounding: str
    kept: str

    @property
    def label(self) -> str:
        """For people."""
        rounding = {"both": "compensated + bias", "compensated": "compensated"}.get(self.rounding, "nearest")
        return rounding + ("" if self.kept == "nothing" else f", +{EXTRA:g} % by {self.kept}")


def made(subject: Subject, parts: Parts) -> Path:
    """The file; layers are rounded and probed once for all parts, and found again on disk."""
    solutions: dict[str, Any] = {}
    return subject.planned(partial(_plan, parts, solutions), solutions)


def _plan(parts: Parts, solutions: dict[str, Any], job: Any) -> Any:
    from hswq.hswq_core import FLOAT8_E4M3FN, format_named, no_progress
    from hswq.hswq_core.budget import Budget, choose_kept, fitting
    from hswq.hswq_core.hswq import by_sensitivity
    from hswq.loader.candidates import Candidate, plan_of
    from hswq.loader.model_aware import plan_model_aware
    from hswq.loader.rounder import SOLVED, Rounder

    row, grid = format_named(FORMAT), FLOAT8_E4M3FN
    whole = plan_model_aware(job, job.states(), file_format=row, grid=grid, budget=Budget(EXTRA), progress=no_progress)
    change = {layer.name: layer.change for layer in whole.plan.layers if layer.change is not None}
    cost = {name: job.by_name[name].weights for name in change}
    budget = Budget(EXTRA).extra_bytes(job.smallest(), len(job.layers))
    error = {name: whole.solutions[name].error for name in change}
    sensitivity = {name: job.session.layers[name].sensitivity for name in change}
    kept: Mapping[str, Any] = {
        "nothing": set(),
        "variance": fitting(by_sensitivity(sensitivity), cost, budget),
        "own error": choose_kept(error, cost, budget),
        "probe": choose_kept(change, cost, budget),
    }
    solved = (
        whole.solutions if parts.rounding == "both" else {n: replace(s, bias=None) for n, s in whole.solutions.items()}
    )
    how = "nearest" if parts.rounding == "nearest" else SOLVED
    if how == SOLVED:
        solutions |= solved
    chosen = Candidate(parts.label, how, frozenset(kept[parts.kept]), parts.kept)
    plan = plan_of(Rounder(job, row, grid, solved), chosen, change, f"{parts.rounding}_{parts.kept}".replace(" ", "_"))
    return replace(plan, method="ablation")


ABLATION = tuple(
    Method(f"{parts.rounding} / {parts.kept}", parts.label, partial(made, parts=parts), open_hswq)
    for parts in (
        Parts("nearest", "nothing"),
        Parts("nearest", "variance"),
        Parts("nearest", "own error"),
        Parts("nearest", "probe"),
        Parts("compensated", "nothing"),
        Parts("both", "nothing"),
        Parts("compensated", "variance"),
        Parts("compensated", "own error"),
        Parts("compensated", "probe"),
        Parts("both", "probe"),
    )
)
