"""Method ``model_aware``: rounded and chosen by what each layer does to this model's own output.

0. A session of few prompts gets more: see ``variety``.
1. Every layer is rounded with the second moments of its inputs, gathered group by group under a memory limit.
2. Each rounded layer alone is put into the model: the change of the output is what it costs to have it in 8 bits.
3. The budget keeps the layers of the largest change per byte.
4. The whole plan is run on states that nothing was fitted to, beside what other methods would make of the same bytes;
   the best is written.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import chain, zip_longest

from ..hswq_core import FileFormat, Grid, Progress
from ..hswq_core.budget import Budget
from ..hswq_core.fingerprint import sample_weights
from ..hswq_core.gram import Moments
from ..hswq_core.rounding import require_unquantized
from ..hswq_core.solve import Solution, solve
from ..hswq_core.split import Split, split_states
from ..hswq_core.states import State
from ..hswq_core.workspace import Workspace, key_of
from .candidates import Outcome, best_of, candidates
from .job import Job
from .moments import gather, in_groups, shared_inputs
from .probe import Probe
from .replay import Replay
from .rounder import Rounder
from .variety import varied

# Of the pictures drawn for variety: to round by; the rest to decide by.
VARIED_FIT_SHARE = 0.75
# Of the work kept on disk; another release's is of no use.
WORK_VERSION = "1"


def plan_model_aware(
    job: Job, states: list[State], *, file_format: FileFormat, grid: Grid, budget: Budget, progress: Progress
) -> Outcome:
    """Plan a conversion under a budget.

    Args:
        job: the opened MODEL.
        states: of the session, in order of key.
        budget: how large the file may be.
        progress: called as (what, done, total); may raise to cancel.

    Raises:
        SessionError: too few states.
        SettingError: a file size that cannot be reached.
        LayerError: a layer with NaN, or already in FP8.
        FileError: the folder of the session cannot be written to.
    """
    extra = budget.extra_bytes(job.smallest(), len(job.layers))
    for layer in job.layers:
        require_unquantized(layer)
    split = split_states(states)
    done = Workspace(job.work_folder, work_key(job, states, file_format, grid))
    rounder = Rounder(job, file_format, grid, done)
    verify = Replay(job.model, split.verify)
    with verify.loaded():
        split = _with_variety(job, split, progress)
        _Solver(rounder, done, Replay(job.model, split.fit), Replay(job.model, split.decide), progress).run()
        cost = {name: job.by_name[name].weights for name in done}
        change = Probe(job.model, split.decide, rounder.delta, done, progress).changes(cost)
        found = candidates(rounder, change, extra)
        return best_of(rounder, found, verify, change, budget.text)


def _with_variety(job: Job, split: Split, progress: Progress) -> Split:
    """Where the session has few prompts, drawn ones beside them, other ones to decide by than to round by."""
    if not split.few_prompts:
        return split
    pictures = varied(job.model, split.fit, progress)
    cut = round(VARIED_FIT_SHARE * len(pictures))
    fit, decide = (list(chain.from_iterable(part)) for part in (pictures[:cut], pictures[cut:]))
    # In turn: a large model is probed on the first few alone.
    mixed = [state for pair in zip_longest(split.decide, decide) for state in pair if state is not None]
    return replace(split, fit=split.fit + fit, decide=mixed)


def work_key(job: Job, states: list[State], file_format: FileFormat, grid: Grid) -> str:
    """Names everything the rounded layers and their probes depend on; the budget is not among it."""
    scaled = ",".join(sorted(file_format.scaled_kinds))
    weights = job.info.fingerprint.weights
    if job.model.patches:  # the fingerprint is of the model without its LoRAs
        weights = sample_weights(job.by_name, lambda name: job.read(job.by_name[name]))
    marks = ",".join(state.mark for state in states)
    return key_of(WORK_VERSION, job.info.fingerprint.layout, str(weights.tolist()), marks, scaled, grid.name)


@dataclass(frozen=True)
class _Solver:
    """Rounds every layer that the states call and that ``done`` lacks."""

    rounder: Rounder
    done: Workspace
    fit: Replay
    held: Replay
    progress: Progress

    def run(self) -> None:
        leaders = shared_inputs(self.held, self.rounder.job.by_name)
        todo = {name: leader for name, leader in leaders.items() if name not in self.done}
        for group in in_groups(self.fit, dict.fromkeys(todo.values())):
            self.progress(f"Watching {group[0]}", len(self.done), len(leaders))
            fit, held = gather(self.fit, group), gather(self.held, group)
            for name in (name for name, leader in todo.items() if leader in fit):
                self.progress(f"Rounding {name}", len(self.done), len(leaders))
                self.done.add(name, self._solution(name, fit[leaders[name]], held[leaders[name]]))

    def _solution(self, name: str, fit: Moments, held: Moments) -> Solution:
        layer, grid = self.rounder.job.by_name[name], self.rounder.grid
        w = self.rounder.job.read(layer)
        moments = [replace(m, gram=m.gram.to(w.device), mean=m.mean.to(w.device)) for m in (fit, held)]
        scaled, has_bias = self.rounder.file_format.scaled(layer.kind), self.rounder.job.has_bias(name)
        found = solve(layer, w, *moments, scaled=scaled, grid=grid, has_bias=has_bias)
        bias = None if found.bias is None else found.bias.cpu()
        return replace(found, codes=found.codes.cpu(), bias=bias)
