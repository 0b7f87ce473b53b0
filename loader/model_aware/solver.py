"""Rounds every layer, group by group: watches inputs, solves codes. Out of memory, it takes fewer at a time."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import comfy.model_management
import torch

from ...hswq_core.devices import CPU
from ...hswq_core.methods.solutions import Solutions
from ...hswq_core.methods.solve import Solution, solve, unsolved
from ...hswq_core.model.layer import Layer
from ...hswq_core.progress import Progress, Step
from ...hswq_core.quant.moments import Moments, Rows
from ..devices import solver_device
from ..replay.relay import Relay
from ..replay.replay import Replay
from .gather import gather, hold, in_groups, shared_inputs
from .rounder import SOLVED, Rounder
from .shortage import attempted

log = logging.getLogger(__name__)

Group = dict[str, list[str]]
Inputs = tuple[dict[str, Moments], dict[str, Moments | Rows]]


@dataclass(frozen=True)
class Solver:
    """Rounds every layer that the states call and that ``done`` lacks.

    When memory runs out, what was gathered is freed and half as many layers are gathered at a time, which gives the
    same codes. A single layer falls back to the CPU; if even that fails it is rounded to nearest, and its solution
    says so.

    Attributes:
        rounder: of the job.
        done: receives the solutions.
        fit, held: states to round by and to decide by.
        progress: called as (step, done, total); may raise to cancel.
    """

    rounder: Rounder
    done: Solutions
    fit: Replay
    held: Replay
    progress: Progress

    def run(self) -> None:
        """Round all of them."""
        seen = shared_inputs(self.held, self.rounder.job.by_name)
        followers: Group = {}
        for name, leader in seen.leader.items():
            if name not in self.done:
                followers.setdefault(leader, []).append(name)
        groups = list(in_groups(self.fit, {leader: seen.rows[leader] for leader in followers}))
        solver = self if len(groups) < 2 else replace(self, fit=Relay.of(self.fit), held=Relay.of(self.held))
        for group in groups:
            solver._round({leader: followers[leader] for leader in group}, len(seen.leader))

    def _round(self, group: Group, total: int) -> None:
        """Round the layers that share the inputs of these leaders."""
        self.progress(Step("Watching", next(iter(group))), len(self.done), total)
        if len(group) == 1:
            self._round_alone(group, total)
            return
        inputs = attempted(partial(self._inputs, list(group)))
        if inputs is not None:
            self._round_with(group, *inputs, total)
        left = {leader: names for leader, names in group.items() if names[-1] not in self.done}
        if left:
            del inputs
            self._round_fewer(left, total)

    def _round_with(self, group: Group, fit: dict[str, Moments], held: dict[str, Moments | Rows], total: int) -> None:
        """In order, until memory runs out: then all that was gathered is released."""
        for leader, names in group.items():
            own = fit.pop(leader), held.pop(leader)  # popped, since wide inputs leave little memory
            for name in names:
                self.progress(Step("Rounding", name), len(self.done), total)
                solution = attempted(partial(self._solved, self.rounder.job.by_name[name], *own))
                if solution is None:
                    fit.clear()
                    held.clear()
                    return
                self.done.add(name, solution)

    def _round_fewer(self, group: Group, total: int) -> None:
        """In two halves, without the layers already done."""
        leaders = list(group)
        half = (len(leaders) + 1) // 2
        log.warning("HSWQ: memory ran out; going on with %d layer inputs at a time.", half)
        for part in (leaders[:half], leaders[half:]):
            if part:
                self._round({leader: [n for n in group[leader] if n not in self.done] for leader in part}, total)

    def _round_alone(self, group: Group, total: int) -> None:
        ((leader, names),) = group.items()
        inputs = attempted(partial(self._inputs, [leader])) or attempted(partial(self._inputs, [leader], CPU))
        own = None if inputs is None else (inputs[0].pop(leader), inputs[1].pop(leader))
        for name in names:
            self.progress(Step("Rounding", name), len(self.done), total)
            layer = self.rounder.job.by_name[name]
            solution = own and (
                attempted(partial(self._solved, layer, *own)) or attempted(partial(self._solved, layer, *own, CPU))
            )
            self.done.add(name, solution or self._unsolved(layer))

    def _inputs(self, leaders: Sequence[str], device: torch.device | None = None) -> Inputs:
        """To round by and to decide by."""
        return gather(self.fit, leaders, device), hold(self.held, leaders, device)

    def _solved(self, layer: Layer, fit: Moments, held: Moments | Rows, device: torch.device | None = None) -> Solution:
        w = self.rounder.job.read(layer)
        device = device or solver_device(len(fit.mean), w.device)
        solution = solve(
            layer,
            w.to(device),
            fit.to(device),
            held.to(device),
            scheme=self.rounder.scheme(layer.name, SOLVED),
            has_bias=self.rounder.job.has_bias(layer.name),
            tick=comfy.model_management.throw_exception_if_processing_interrupted,
        )
        return solution.to(CPU)

    def _unsolved(self, layer: Layer) -> Solution:
        log.warning("HSWQ: no memory to round layer %s by its inputs; it is rounded to nearest.", layer.name)
        return unsolved(layer, self.rounder.job.read(layer).to(CPU), self.rounder.scheme(layer.name, SOLVED))
