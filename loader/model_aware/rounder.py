"""The layers of a MODEL, each as it would be in 8 bits: its change for a replay, its row for a plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch

from ...hswq_core.methods.decide import quantized
from ...hswq_core.methods.solve import Solution
from ...hswq_core.plan.budget import kept_bytes
from ...hswq_core.plan.encoding import Encoding
from ...hswq_core.plan.plan import LayerPlan
from ...hswq_core.quant.grid import largest
from ...hswq_core.quant.metrics import sqnr_db
from ...hswq_core.quant.schemes.scheme import Scheme
from ..job import Job
from ..replay.replay import Delta

SOLVED, CAST = "solved", "cast"


@dataclass(frozen=True)
class Rounder:
    """Three ways to round a layer.

    ``"solved"``: as its solution says; ``"nearest"``: to the nearest code, scaled where the format scales;
    ``"cast"``: regardless of its largest weight, with scale 1 where the format wants one.

    Attributes:
        solutions: {layer name: solution} of every layer the states call.
    """

    job: Job
    encoding: Encoding
    solutions: Mapping[str, Solution]

    def scheme(self, name: str, how: str) -> Scheme:
        """How a layer is stored."""
        kind = self.job.by_name[name].kind
        return self.encoding.scheme(kind) if how == SOLVED else self.encoding.usual(kind)

    def cost(self, name: str) -> int:
        """Additional bytes that a layer takes in 16 bits."""
        shape = self.job.by_name[name].shape
        return kept_bytes(shape) - self.scheme(name, SOLVED).nbytes(shape)

    def weight(self, name: str) -> torch.Tensor:
        """float32, on the search device."""
        return self.job.read(self.job.by_name[name]).float()

    def delta(self, name: str, how: str = SOLVED, input_amax: float = 0.0) -> Delta:
        """What rounding changes, and what casting the inputs at this clip limit does unless it is 0."""
        w = self.weight(name)
        rounded, bias = self._restored(name, w, how), self.solutions[name].bias if how == SOLVED else None
        if not input_amax:
            return Delta(rounded - w, bias)
        return Delta(rounded - w, bias, rounded, partial(self.scheme(name, how).activations, amax=input_amax))

    def row(self, name: str, how: str) -> LayerPlan:
        """The plan's row for the layer, quantized."""
        w = self.weight(name)
        sqnr = sqnr_db(w, self._restored(name, w, how))
        plan = quantized(self.job.by_name[name], how, self.scheme(name, how), self._amax(name, w, how), sqnr)
        if how != SOLVED:
            return plan
        solution = self.solutions[name]
        return replace(plan, reason=solution.how).measured(damping=solution.damping, dead=solution.dead)

    def _restored(self, name: str, w: torch.Tensor, how: str) -> torch.Tensor:
        if how == SOLVED:
            return self.solutions[name].restored(w.device)
        return self.scheme(name, how).fake_quantize(w, self._amax(name, w, how))

    def _amax(self, name: str, w: torch.Tensor, how: str) -> float:
        """Clip limit: practically none where there is no scale."""
        scheme = self.scheme(name, how)
        return largest(w) if how != CAST and scheme.scaled else scheme.plain_limit
