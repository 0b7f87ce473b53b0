"""Method ``model_aware``: rounds and chooses layers by what they do to this model's own output.

0. A session with few prompts gets more: see ``variety``.
1. Every layer is rounded with the second moments of its inputs, gathered group by group under a memory limit.
2. Each rounded layer is put into the model alone: the change of the output is the cost of having that layer in 8 bits.
   In a large model only layers that may be worth keeping are probed.
3. The budget keeps the layers with the largest change per byte.
4. The whole plan is run on unseen states, to which nothing was fitted, against what other methods would make of the
   same bytes; the best is written.
5. On request, layers that may multiply in 8 bits are chosen: see ``fast_matmul``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import chain, zip_longest

from ...hswq_core.calibration.split import Split, split_states
from ...hswq_core.calibration.states import State
from ...hswq_core.methods.decide import require_unquantized
from ...hswq_core.methods.method import Task
from ...hswq_core.plan.budget import Budget
from ...hswq_core.progress import Progress
from ..devices import solver_room
from ..job import Job
from ..replay.replay import Replay
from ..replay.variety import varied
from .candidates import Outcome, best_of, candidates
from .fast_matmul import speeded
from .gather import columns
from .probe import Probe
from .rounder import Rounder
from .solver import Solver

# Share of the pictures drawn for variety that layers are rounded by; the rest is to decide by.
VARIED_FIT_SHARE = 0.75
# States on which casting the inputs is measured.
FAST_STATES = 8


@dataclass(frozen=True, kw_only=True)
class ModelTask(Task):
    """What methods that may run the model plan with.

    Attributes:
        job: the opened MODEL.
        states: model calls of the session, in key order; none for a method that needs none.
    """

    job: Job
    states: list[State]


def plan_model_aware(task: ModelTask, budget: Budget) -> Outcome:
    """Plan a conversion under a budget.

    Raises:
        SessionError: too few states.
        SettingError: a file size that cannot be reached.
        LayerError: a layer with NaN, or already in FP8.
        FileError: the folder of the session cannot be written to.
    """
    job, encoding, done, progress = task.job, task.encoding, task.solutions, task.progress
    extra = budget.extra_bytes(job.smallest(encoding), len(task.layers))
    for layer in task.layers:
        require_unquantized(layer)
    split = split_states(task.states)
    rounder = Rounder(job, encoding, done)
    verify = Replay(job.model, split.verify)
    with verify.loaded(solver_room(map(columns, verify.modules.values()))):
        split = _with_variety(job, split, progress)
        Solver(rounder, done, Replay(job.model, split.fit), Replay(job.model, split.decide), progress).run()
        cost = {name: rounder.cost(name) for name in done}
        error = {name: done.error(name) for name in cost}
        change = Probe(job.model, split.decide, rounder.delta, done, progress).changes(cost, error, extra)
        contenders = candidates(rounder, change, extra)
        outcome = best_of(rounder, contenders, verify, change, budget.text, progress)
        if not encoding.fast_matmul:
            return outcome
        gain = {name: change[name] / error[name] if error[name] else 0.0 for name in change}
        return speeded(outcome, rounder, gain, Replay(job.model, split.decide[:FAST_STATES]), verify, progress)


def _with_variety(job: Job, split: Split, progress: Progress) -> Split:
    """Adds drawn states if the session has few prompts: different ones to round by and to decide by."""
    if not split.few_prompts:
        return split
    pictures = varied(job.model, split.fit, progress)
    cut = round(VARIED_FIT_SHARE * len(pictures))
    fit, decide = (list(chain.from_iterable(part)) for part in (pictures[:cut], pictures[cut:]))
    # Interleaved: a large model is probed on the first few only.
    mixed = [state for pair in zip_longest(split.decide, decide) for state in pair if state is not None]
    return replace(split, fit=split.fit + fit, decide=mixed)
