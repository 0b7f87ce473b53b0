"""What each rounded layer on its own does to the model's output.

Probing costs model calls. All layers of a small model are probed; of a large one those with the largest output error
of their own per byte, which costs no call, until they hold several times the bytes to spend. On the reference models
that leaves 0 to 0.5 dB more change of the pictures than ranking by the pictures themselves at up to +3 %, as probing
all layers does, and two calls rank nearly as well as sixteen; own error alone left up to 5 dB more (bench/probing.py).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from ...hswq_core.calibration.states import State
from ...hswq_core.methods.solutions import Solutions
from ...hswq_core.plan.budget import per_byte
from ...hswq_core.progress import Progress, Step
from ..replay.prefix import Prefix
from ..replay.replay import Delta, Replay

if TYPE_CHECKING:
    from ..comfyui.types import ModelPatcher

# At least this many layers are measured, whatever the budget.
LEAST_LAYERS = 128
# The measured layers take at least this many times the budget.
COVER = 4
# Calls in total: 128 layers on 8 states.
CALLS = 1024
LEAST_STATES = 2
# Latent positions per side of the central crop that is run: a quarter of a picture of 1024 x 1024, in a quarter of the
# time or less. On the reference models a middle quarter leaves up to 0.1 dB more at +3 %, 0.4 at +6 (bench/probing.py).
MOST_SIDE = 64

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
        done: stores the numbers; what it already has is not measured again.
        progress: called as (step, done, total); may raise to cancel.
    """

    model: ModelPatcher
    states: list[State]
    make: Make
    done: Solutions
    progress: Progress

    def changes(self, cost: Mapping[str, int], error: Mapping[str, float], budget: int) -> dict[str, float]:
        """{layer: mean squared relative change of the model's output with only that layer rounded}.

        Measured for the ``shortlist``, estimated for the others.

        Args:
            cost: {layer: bytes it takes to keep it}.
            error: {layer: squared relative error of its own output}.
            budget: bytes to spend.
        """
        probed = shortlist(error, cost, budget)
        measured = self._measured(self.states[: max(LEAST_STATES, CALLS // max(1, len(probed)))], probed)
        return filled(measured, error)

    def _measured(self, states: list[State], names: Sequence[str]) -> dict[str, float]:
        stage = f"probe_{len(states)}"
        known = self.done.numbers(stage)
        missing = [name for name in names if name not in known]
        if missing:
            prefix = Prefix(Replay(self.model, [state.cropped(MOST_SIDE) for state in states]))
            for i, name in enumerate(missing, len(names) - len(missing)):
                self.progress(Step("Probing", name), i, len(names))
                known[name] = prefix.change(name, self.make(name))
                if (i + 1) % SAVE_EVERY == 0 or i + 1 == len(names):
                    self.done.save_numbers(stage, known)
        return {name: known[name] for name in names}


def shortlist(error: Mapping[str, float], cost: Mapping[str, int], budget: int) -> list[str]:
    """Layers to probe; all of a small model.

    Args:
        error, cost, budget: as for ``Probe.changes``.
    """
    return max(per_byte(error, cost)[:LEAST_LAYERS], likely(error, cost, budget), key=len)


def likely(error: Mapping[str, float], cost: Mapping[str, int], budget: int) -> list[str]:
    """Layers by their own error per byte, largest first, until they hold ``COVER`` times the budget."""
    ranked = per_byte(error, cost)
    before = [0, *accumulate(cost[name] for name in ranked)]
    return [name for i, name in enumerate(ranked) if before[i] < COVER * budget]


def filled(measured: Mapping[str, float], error: Mapping[str, float]) -> dict[str, float]:
    """Adds the unmeasured layers: their own error times the median ratio of the measured ones."""
    ratios = [change / error[name] for name, change in measured.items() if error[name] > 0]
    typical = statistics.median(ratios) if ratios else 0.0
    return {name: measured.get(name, typical * own) for name, own in error.items()}
