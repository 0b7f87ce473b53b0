"""What each rounded layer alone does to the model's output: roughly for all, exactly for those that matter.

The cost is model calls, so a large model is probed in two passes. On the reference models two calls rank layers about
as well as sixteen (0 to 0.9 dB more change of the pictures is left than by the pictures' own ranking); their own output
error, which costs nothing, left up to 6 dB more on the UNet (bench/probing.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..hswq_core import Progress
from ..hswq_core.budget import per_byte
from ..hswq_core.states import State
from ..hswq_core.workspace import Workspace
from .replay import Delta, Replay

# As many layers are measured in full at once, more only after a first pass.
ALL_IN_FULL = 128
FIRST_PASS_STATES = 2
SHORTLIST = 0.25
# Calls of the full measurement: 128 layers on 16 states.
FULL_CALLS = 2048
LEAST_STATES = 4

# Layers between two saves.
SAVE_EVERY = 16

Make = Callable[[str], Delta]


@dataclass(frozen=True)
class Probe:
    """A model to be probed.

    Attributes:
        model: a ModelPatcher, loaded.
        states: to measure on.
        make: layer name -> what rounding changes.
        done: keeps the numbers; what it has is not measured again.
        progress: called as (what, done, total); may raise to cancel.
    """

    model: Any
    states: list[State]
    make: Make
    done: Workspace
    progress: Progress

    def changes(self, cost: Mapping[str, int]) -> dict[str, float]:
        """{layer: mean squared relative change of the model's output with that layer alone rounded}.

        Args:
            cost: {layer: bytes that keeping it takes}.
        """
        if len(cost) <= ALL_IN_FULL:
            return self._measured("probe", self._enough(len(cost)), cost)
        change = self._measured("first_probe", self.states[:FIRST_PASS_STATES], cost)
        best = per_byte(change, cost)[: max(ALL_IN_FULL, round(SHORTLIST * len(cost)))]
        return change | self._measured("probe", self._enough(len(best)), best)

    def _enough(self, layers: int) -> list[State]:
        return self.states[: max(LEAST_STATES, FULL_CALLS // layers)]

    def _measured(self, stage: str, states: list[State], names: Iterable[str]) -> dict[str, float]:
        replay, names = Replay(self.model, states), list(names)
        known = self.done.numbers(stage)
        change = {name: known[name] for name in names if name in known}
        reference = replay.run()
        for name in names:
            if name in change:
                continue
            self.progress(f"Probing {name}", len(change), len(names))
            made = self.make(name)
            change[name] = replay.change(reference, {name: lambda made=made: made})
            if len(change) % SAVE_EVERY == 0:
                self.done.save_numbers(stage, change)
        self.done.save_numbers(stage, change)
        return change
