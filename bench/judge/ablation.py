"""What each part of ``model_aware`` contributes: its parts alone and together, at the same number of bytes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from judge.methods import Method
from judge.subject import Subject, open_hswq

EXTRA = 3.0
FORMAT = "v2"


@dataclass(frozen=True)
class Parts:
    """Which parts are enabled.

    Attributes:
        rounding: "nearest", "compensated", or "both": compensated with bias correction.
        kept: how the budget is spent: by "nothing", "variance" (HSWQ's), "own error" or "probe".
    """

    rounding: str
    kept: str

    @property
    def label(self) -> str:
        """The row's label."""
        rounding = {"both": "compensated + bias", "compensated": "compensated"}.get(self.rounding, "nearest")
        return rounding + ("" if self.kept == "nothing" else f", +{EXTRA:g} % by {self.kept}")


def made(subject: Subject, parts: Parts) -> Path:
    """The file; layers are rounded and probed once for all parts, and the work is cached on disk."""
    from hswq.loader.model_aware.candidates import Candidate, plan_of
    from hswq.loader.model_aware.rounder import SOLVED

    job, rounder, whole = subject.solved(FORMAT, EXTRA)
    solved = dict(whole.solutions)
    if parts.rounding != "both":
        solved = {name: replace(solution, bias=None) for name, solution in solved.items()}
    how = "nearest" if parts.rounding == "nearest" else SOLVED
    change = {layer.name: layer.change for layer in whole.plan.layers if layer.change is not None}
    chosen = Candidate(parts.label, how, frozenset(_kept(parts, rounder, change, solved)), parts.kept)
    budget = f"{parts.rounding}_{parts.kept}".replace(" ", "_")
    with torch.inference_mode():
        plan = plan_of(replace(rounder, solutions=solved), chosen, change, budget)
    return subject.written(job, replace(plan, method="ablation"), solved if how == SOLVED else {})


def _kept(parts: Parts, rounder: Any, change: Mapping[str, float], solved: Mapping[str, Any]) -> Collection[str]:
    from hswq.hswq_core.methods.hswq import by_sensitivity
    from hswq.hswq_core.plan.budget import Budget, choose_kept, fitting

    job = rounder.job
    cost = {name: rounder.cost(name) for name in change}
    budget = Budget(EXTRA).extra_bytes(job.smallest(rounder.encoding), len(job.layers))
    if parts.kept == "variance":
        return fitting(by_sensitivity({name: job.session.layers[name].sensitivity for name in change}), cost, budget)
    measure = {"probe": change, "own error": {name: solved[name].error for name in change}, "nothing": {}}
    return choose_kept(measure[parts.kept], cost, budget)


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
