"""One reference model, calibrated by the pack's own wrapper and opened for conversion by the pack's own loader."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from reference_models.architectures import Reference, register
from reference_models.prompts import calibration_prompts
from reference_models.sampling import BATCH, draw
from rig import pack
from rig.inprocess import load_comfy, load_model, open_fp8

SESSION_SAVE_EVERY = 1000


def prepare() -> None:
    """Load ComfyUI, the reference models and the pack into this process; does nothing when called again."""
    load_comfy()
    register()
    pack.alias()


class Subject:
    """A reference model under test.

    Args:
        reference: which model.
        pictures: how many to calibrate with, in runs of ``BATCH``.
        calibration: which of the independent sets of calibration prompts.
        states: model calls to keep; None: the node's default.
    """

    def __init__(self, reference: Reference, pictures: int, calibration: int = 0, states: int | None = None) -> None:
        prepare()
        self.reference = reference
        self.session = f"{reference.name}_{calibration}"
        with torch.inference_mode():
            self.model = load_model(reference.file)
        began = time.perf_counter()
        self._calibrate(pictures, calibration, {} if states is None else {"states": states})
        self.calibration_seconds = time.perf_counter() - began

    def _calibrate(self, pictures: int, calibration: int, settings: dict[str, int]) -> None:
        from hswq.hswq_core.calibration.states_file import states_path
        from hswq.loader.calibration.model import calibrated
        from hswq.loader.sessions.store import path_of
        from hswq.nodes.calibration import MEASURE_EVERY

        path = path_of(self.session)
        for old in (path, states_path(path)):
            old.unlink(missing_ok=True)
        prompts = calibration_prompts(pictures, calibration)
        with torch.inference_mode():
            settings["measure_every"] = MEASURE_EVERY
            watched = calibrated(self.model, path, SESSION_SAVE_EVERY, lambda _line: None, **settings)
        for start in range(0, len(prompts), BATCH):
            draw(watched, self.reference, prompts[start : start + BATCH])

    def planned(self, plan: Callable[[Any], Any]) -> Path:
        """The file of a plan made by ``plan``: (loader's Job) -> Planned."""
        from hswq.loader.job import Job

        with torch.inference_mode():
            job = Job.open(self.model, None, None, self.session)
            planned = plan(job)
            return self.written(job, planned.plan, planned.solutions)

    def written(self, job: Any, plan: Any, solutions: Mapping[str, Any]) -> Path:
        """The file of a plan, written by the pack's writer.

        Args:
            solutions: of layers that are not rounded to nearest.
        """
        from hswq.hswq_core.progress import no_progress

        with torch.inference_mode():
            target = job.target(f"{plan.method}_{plan.budget}", plan.file_format, "")
            return Path(job.write(target, plan, no_progress, solutions).path)

    def solved(self, file_format: str, extra_percent: float, **options: Any) -> tuple[Any, Any, Any]:
        """(job, its rounder, outcome) of ``model_aware``; the work stays on disk for the next call.

        Args:
            options: for the Encoding.
        """
        from hswq.hswq_core.plan.budget import Budget
        from hswq.hswq_core.plan.encoding import Encoding
        from hswq.hswq_core.plan.formats import format_named
        from hswq.loader.convert.methods import MODEL_AWARE
        from hswq.loader.convert.model import task_for
        from hswq.loader.job import Job
        from hswq.loader.model_aware.plan import plan_model_aware
        from hswq.loader.model_aware.rounder import Rounder

        with torch.inference_mode():
            job = Job.open(self.model, None, None, self.session)
            encoding = Encoding(format_named(file_format), **options)
            outcome = plan_model_aware(task_for(job, MODEL_AWARE, encoding), Budget(extra_percent))
            return job, Rounder(job, encoding, outcome.solutions), outcome

    def converted(self, file_format: str, method: str, **settings: Any) -> Path:
        """The file the Converter node writes."""
        from hswq.hswq_core.progress import no_progress
        from hswq.loader.convert.model import Request, convert_model

        request = Request(self.session, file_format, method, **settings)
        with torch.inference_mode():
            return Path(convert_model(self.model, None, None, request, no_progress).path)


def open_stock(path: Path) -> Any:
    """Opened with ComfyUI's own Load Diffusion Model."""
    with torch.inference_mode():
        return load_model(path)


def open_fast(path: Path) -> Any:
    """The same with FP8 multiplication switched on, as on a card that supports it; torch emulates it on a CPU."""
    import comfy.model_management

    known, comfy.model_management.SUPPORT_FP8_OPS = comfy.model_management.SUPPORT_FP8_OPS, True
    try:
        return open_stock(path)
    finally:
        comfy.model_management.SUPPORT_FP8_OPS = known


def open_hswq(path: Path, **options: Any) -> Any:
    """Opened with HSWQ Diffusion Model Loader."""
    with torch.inference_mode():
        return open_fp8(path, **options)
