"""One conversion from a connected MODEL: statistics, source, plan, file, check."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import comfy.model_management

from ...hswq_core.convert.output import Conversion
from ...hswq_core.errors import SessionError, SettingError
from ...hswq_core.files.atomic import require_space
from ...hswq_core.methods.exclusions import Exclusions
from ...hswq_core.methods.hswq import DEFAULT_KEEP_RATIO, check_keep_ratio, plan_hswq
from ...hswq_core.methods.solve import Solution
from ...hswq_core.plan.budget import DEFAULT_EXTRA_PERCENT, Budget
from ...hswq_core.plan.encoding import Encoding
from ...hswq_core.plan.formats import TENSOR, format_named
from ...hswq_core.plan.plan import Plan
from ...hswq_core.progress import Progress, Step
from ..devices import runs_on_cpu
from ..job import Job
from ..model_aware.plan import plan_model_aware
from ..sessions.store import locked
from .advice import ON_CPU, merged_notes, prompts_notes


@dataclass(frozen=True)
class Request:
    """What the user asked for; see the Converter node's inputs."""

    session: str
    file_format: str
    method: str = "model_aware"
    extra_percent: float = DEFAULT_EXTRA_PERCENT
    keep_ratio: float = DEFAULT_KEEP_RATIO
    filename_prefix: str = ""
    target_mb: float = 0.0
    scale_per: str = TENSOR
    fast_matmul: float = 0.0

    @property
    def size(self) -> Budget:
        """Of model_aware. Raises SettingError if it is out of range."""
        return Budget(self.extra_percent, self.target_mb)

    @property
    def encoding(self) -> Encoding:
        """Of model_aware. Raises SettingError for an option that the format has not."""
        return Encoding(format_named(self.file_format), granularity=self.scale_per, fast_matmul=self.fast_matmul)


@dataclass(frozen=True)
class Planned:
    """What a method decided.

    Attributes:
        plan: which layer is kept or quantized.
        solutions: codes of the layers the method rounded itself.
        notes: lines for the report.
    """

    plan: Plan
    solutions: Mapping[str, Solution] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Method:
    """One row.

    Attributes:
        budget: the request's budget as it appears in file names; raises SettingError if it is out of range.
        plan: (job, request, progress) -> Planned.
        room: (job, request, target) -> {file or folder: bytes} that the conversion takes on disk.
    """

    budget: Callable[[Request], str]
    plan: Callable[[Job, Request, Progress], Planned]
    room: Callable[[Job, Request, Path], dict[Path, int]]


def _model_aware(job: Job, request: Request, progress: Progress) -> Planned:
    states = job.states()
    if runs_on_cpu():
        progress(Step(ON_CPU), 0, 1)
    outcome = plan_model_aware(job, states, request.encoding, request.size, progress)
    return Planned(outcome.plan, outcome.solutions, (*outcome.notes(), *prompts_notes(states)))


def _hswq(job: Job, request: Request, progress: Progress) -> Planned:
    if request.encoding != Encoding(format_named(request.file_format)):
        raise SettingError(
            "scale_per, fast_matmul",
            got=f"{request.scale_per}, {request.fast_matmul:g} with method hswq",
            expected="method model_aware",
            remedy="Choose model_aware, or leave both at their defaults.",
        )
    plan = plan_hswq(
        job.layers,
        job.session,
        job.read,
        exclusions=Exclusions(job.info.family),
        file_format=format_named(request.file_format),
        keep_ratio=request.keep_ratio,
        progress=progress,
    )
    return Planned(plan)


def _model_aware_room(job: Job, request: Request, target: Path) -> dict[Path, int]:
    extra = request.size.extra_bytes(job.smallest(request.encoding), len(job.layers))
    return job.room(target, extra) | job.room_for_work()


METHODS = {
    "model_aware": Method(lambda request: request.size.text, _model_aware, _model_aware_room),
    "hswq": Method(
        lambda request: f"{check_keep_ratio(request.keep_ratio):g}",
        _hswq,
        lambda job, _request, target: job.room(target),  # the layers it keeps come on top: known only with the plan
    ),
}


def method_named(name: str) -> Method:
    """The row called ``name``; SettingError for any other."""
    if name not in METHODS:
        raise SettingError("method", got=repr(name), expected=" or ".join(METHODS), remedy="Choose one of them.")
    return METHODS[name]


def convert_model(model: Any, clip: Any, vae: Any, request: Request, progress: Progress) -> tuple[Conversion, str]:
    """Convert and write where stock loaders look; returns the file and a report.

    Raises:
        HSWQError: wrong setting, missing or foreign statistics, unwritable folder, a file that would not open.
    """
    method = method_named(request.method)
    budget, file_format = method.budget(request), request.encoding.file_format
    job = Job(model, clip, vae, request.session)
    target = job.target(budget, file_format.name, request.filename_prefix)
    require_space(method.room(job, request, target))
    with _work(job.work_folder):
        planned = method.plan(job, request, progress)
        done, text = job.write(target, planned.plan, progress, planned.solutions)
    return done, "\n".join([text, *planned.notes, *merged_notes(model)])


@contextmanager
def _work(folder: Path) -> Iterator[None]:
    """What is in the folder survives an error or a crash, to go on from; Cancel and success remove it."""
    busy = SessionError(
        f"Session {folder.stem}",
        got="another conversion of it under way",
        expected="one at a time",
        remedy="Wait until it is done, then convert again.",
    )
    with locked(folder, 0, busy):
        try:
            yield
        except comfy.model_management.InterruptProcessingException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        shutil.rmtree(folder, ignore_errors=True)
