"""One conversion from a connected MODEL: statistics, source, plan, file, check."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..hswq_core import (
    FLOAT8_E4M3FN,
    Conversion,
    Exclusions,
    Plan,
    Progress,
    SettingError,
    format_named,
    plan_hswq,
)
from ..hswq_core.budget import DEFAULT_EXTRA_PERCENT, check_extra_percent
from ..hswq_core.hswq import check_keep_ratio
from ..hswq_core.solve import Solution
from .job import Job
from .model_aware import plan_model_aware


@dataclass(frozen=True)
class Request:
    """What the user asked for; see the Converter node's inputs."""

    session: str
    file_format: str
    method: str = "model_aware"
    extra_percent: float = DEFAULT_EXTRA_PERCENT
    keep_ratio: float = 0.25
    filename_prefix: str = ""


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
    """

    budget: Callable[[Request], str]
    plan: Callable[[Job, Request, Progress], Planned]


def _model_aware(job: Job, request: Request, progress: Progress) -> Planned:
    outcome = plan_model_aware(
        job,
        job.states(),
        file_format=format_named(request.file_format),
        grid=FLOAT8_E4M3FN,
        extra=request.extra_percent,
        progress=progress,
    )
    return Planned(outcome.plan, outcome.solutions, outcome.notes())


def _hswq(job: Job, request: Request, progress: Progress) -> Planned:
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


METHODS = {
    "model_aware": Method(lambda request: f"{check_extra_percent(request.extra_percent):g}pct", _model_aware),
    "hswq": Method(lambda request: f"{check_keep_ratio(request.keep_ratio):g}", _hswq),
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
    file_format, method = format_named(request.file_format), method_named(request.method)
    budget = method.budget(request)
    job = Job(model, clip, vae, request.session)
    target = job.target(budget, file_format.name, request.filename_prefix)
    planned = method.plan(job, request, progress)
    done, text = job.write(target, planned.plan, progress, planned.solutions)
    return done, "\n".join([text, *planned.notes])
