"""One conversion from a connected MODEL: statistics, source, plan, file, check."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import comfy.model_management

from ...hswq_core.calibration.states import State
from ...hswq_core.convert.conversion import Conversion
from ...hswq_core.errors import SessionError
from ...hswq_core.files.atomic import require_space
from ...hswq_core.files.locks import locked
from ...hswq_core.methods.exclusions import Exclusions
from ...hswq_core.methods.hswq import DEFAULT_KEEP_RATIO
from ...hswq_core.methods.method import STATES, Method, Settings, method_named, require_options
from ...hswq_core.methods.solutions import Solutions
from ...hswq_core.plan.budget import DEFAULT_EXTRA_PERCENT
from ...hswq_core.plan.encoding import Encoding
from ...hswq_core.plan.formats import format_named
from ...hswq_core.progress import Progress, no_progress
from ...hswq_core.quant.schemes.scheme import TENSOR
from ..devices import make_room, search_device
from ..job import Job
from ..model_aware.plan import ModelTask
from .advice import merged_notes
from .methods import METHODS, MODEL_AWARE

if TYPE_CHECKING:
    from ..comfyui.types import CLIP, VAE, ModelPatcher


@dataclass(frozen=True)
class Request:
    """What the user asked for; see the Converter node's inputs."""

    session: str
    file_format: str
    method: str = MODEL_AWARE.name
    extra_percent: float = DEFAULT_EXTRA_PERCENT
    keep_ratio: float = DEFAULT_KEEP_RATIO
    filename_prefix: str = ""
    target_mb: float = 0.0
    scale_per: str = TENSOR
    fast_matmul: float = 0.0

    @property
    def encoding(self) -> Encoding:
        """How layers are stored. Raises SettingError for an option that the format lacks."""
        return Encoding(format_named(self.file_format), granularity=self.scale_per, fast_matmul=self.fast_matmul)


def convert_model(
    model: ModelPatcher, clip: CLIP | None, vae: VAE | None, request: Request, progress: Progress
) -> Conversion:
    """Convert, and write where stock loaders look.

    Raises:
        HSWQError: wrong setting, missing or foreign statistics, unwritable folder, a file that would not open.
    """
    method, encoding = method_named(request.method, METHODS), request.encoding
    settings = method.chosen(request)
    require_options(method, encoding, METHODS)
    job = Job.open(model, clip, vae, request.session)
    tail = method.tail(settings, job.session)
    target = job.target(tail, encoding.file_format.name, request.filename_prefix)
    require_space(_room(job, method, settings, encoding, target))
    make_room(job.layers, search_device())
    with _work(job.work_folder):
        planned = method.plan(task_for(job, method, encoding, progress), settings)
        done = job.write(target, planned.plan, progress, planned.solutions)
    return replace(done, notes=(*planned.notes, *merged_notes(model)))


def task_for(
    job: Job,
    method: Method[ModelTask],
    encoding: Encoding,
    progress: Progress = no_progress,
    states: list[State] | None = None,
) -> ModelTask:
    """What ``method`` plans with; the work of an earlier run is resumed.

    Args:
        states: model calls to plan with; None: those of the session, if the method needs any.
    """
    if states is None:
        states = job.states() if STATES in method.needs else []
    key = job.work_key(method.name, states, encoding) if method.own_codes else ""
    return ModelTask(
        job=job,
        layers=job.layers,
        read=job.read,
        exclusions=Exclusions(job.info.family),
        encoding=encoding,
        solutions=Solutions.resumed(job.work_folder, key) if method.own_codes else Solutions(job.work_folder),
        session=job.session,
        states=states,
        progress=progress,
    )


def _room(job: Job, method: Method[ModelTask], settings: Settings, encoding: Encoding, target: Path) -> dict[Path, int]:
    """{file or folder: bytes} that the conversion takes on disk."""
    extra = settings.extra_bytes(job.smallest(encoding), len(job.layers))
    return job.room(target, encoding, extra) | (job.room_for_work(encoding) if method.own_codes else {})


@contextmanager
def _work(folder: Path) -> Iterator[None]:
    """The folder survives an error or a crash, so that work can be resumed; Cancel and success delete it."""
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
