"""The layers of a MODEL, each as it would be in 8 bits: its change for a replay, its row for a plan."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch

from ...hswq_core.methods.solve import Solution
from ...hswq_core.plan.encoding import Encoding
from ...hswq_core.plan.plan import QUANTIZE, LayerPlan
from ...hswq_core.quant.grid import Grid, largest
from ...hswq_core.quant.metrics import sqnr_db
from ..job import Job
from ..replay.replay import Delta

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
    encoding: Encoding
    solutions: Mapping[str, Solution]

    def weight(self, name: str) -> torch.Tensor:
        """float32, on the device that searches."""
        return self.job.read(self.job.by_name[name]).float()

    def delta(self, name: str, how: str = SOLVED, input_amax: float = 0.0) -> Delta:
        """What rounding changes, and casting the inputs with this clip limit unless it is 0."""
        w = self.weight(name)
        rounded, bias = self._restored(name, w, how), self.solutions[name].bias if how == SOLVED else None
        if not input_amax:
            return Delta(rounded - w, bias)
        return Delta(rounded - w, bias, rounded, partial(cast_inputs, amax=input_amax, grid=self.encoding.grid))

    def row(self, name: str, how: str) -> LayerPlan:
        """The layer quantized."""
        layer, w = self.job.by_name[name], self.weight(name)
        scaled, amax = self._scaled(name), self._amax(name, w, how)
        sqnr = sqnr_db(w, self._restored(name, w, how))
        known = None if math.isinf(sqnr) else sqnr
        plan = LayerPlan(name, layer.kind, layer.shape, QUANTIZE, how, scaled, amax, sqnr_db=known)
        if how != SOLVED:
            return plan
        found = self.solutions[name]
        return replace(plan, reason=found.how, damping=found.damping, dead=found.dead)

    def _restored(self, name: str, w: torch.Tensor, how: str) -> torch.Tensor:
        grid = self.encoding.grid
        if how == SOLVED:
            return self.solutions[name].restored(grid, w.device)
        return grid.fake_quantize(w, self._amax(name, w, how), scaled=self._scaled(name))

    def _scaled(self, name: str) -> bool:
        return self.encoding.scaled(self.job.by_name[name].kind)

    def _amax(self, name: str, w: torch.Tensor, how: str) -> float:
        return largest(w) if how != CAST and self._scaled(name) else self.encoding.grid.max


def cast_inputs(x: torch.Tensor, amax: float, grid: Grid) -> torch.Tensor:
    """What a loader's 8-bit multiplication makes of inputs, in their dtype."""
    return grid.fake_quantize(x, amax, scaled=True).to(x.dtype)
