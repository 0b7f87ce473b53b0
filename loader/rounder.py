"""The layers of a MODEL, each as it would be in 8 bits: its change for a replay, its row for a plan."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from ..hswq_core import QUANTIZE, FileFormat, Grid, LayerPlan
from ..hswq_core.metrics import sqnr_db
from ..hswq_core.search import largest
from ..hswq_core.solve import NEAREST, Solution
from .job import Job
from .replay import Delta

SOLVED, CAST = "solved", "cast"


@dataclass(frozen=True)
class Rounder:
    """Three ways to round a layer.

    ``"solved"``: as its solution says; ``"nearest"``: to the nearest code, scaled where the format scales;
    ``"cast"``: without regard to its largest weight, scale 1 where the format wants one.

    Attributes:
        solutions: {layer name: solution} of every layer the states call.
    """

    job: Job
    file_format: FileFormat
    grid: Grid
    solutions: Mapping[str, Solution]

    def weight(self, name: str) -> torch.Tensor:
        """float32, on the device that searches."""
        return self.job.read(self.job.by_name[name]).float()

    def delta(self, name: str, how: str = SOLVED) -> Delta:
        """What rounding changes."""
        w = self.weight(name)
        return Delta(self._restored(name, w, how) - w, self.solutions[name].bias if how == SOLVED else None)

    def row(self, name: str, how: str) -> LayerPlan:
        """The layer quantized."""
        layer, w, scaled = self.job.by_name[name], self.weight(name), self._scaled(name)
        sqnr = sqnr_db(w, self._restored(name, w, how))
        known = None if math.isinf(sqnr) else sqnr
        plan = LayerPlan(name, layer.kind, layer.shape, QUANTIZE, how, scaled, self._amax(name, w, how), sqnr_db=known)
        if how != SOLVED:
            return plan
        found = self.solutions[name]
        return replace(plan, reason=found.how, amax=found.amax, damping=found.damping, dead=found.dead)

    def _restored(self, name: str, w: torch.Tensor, how: str) -> torch.Tensor:
        if how == SOLVED:
            return self.solutions[name].restored(self.grid, w.device)
        return self.grid.fake_quantize(w, self._amax(name, w, how), scaled=self._scaled(name))

    def _scaled(self, name: str) -> bool:
        return self.file_format.scaled(self.job.by_name[name].kind)

    def _amax(self, name: str, w: torch.Tensor, how: str) -> float:
        return largest(w) if how == NEAREST and self._scaled(name) else self.grid.max
