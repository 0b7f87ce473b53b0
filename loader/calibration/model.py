"""Observation of a model during ordinary sampling, without changing the picture.

OUTER_SAMPLE opens and closes a sampling run, APPLY_MODEL installs the hooks on the model that really runs
(ComfyUI may swap in another patcher than the node's). Hooks are gone after success, error and interrupt.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from comfy.patcher_extension import WrappersMP

from ...hswq_core.calibration.exclusive import PATIENCE, PATIENCE_WITHIN_A_RUN
from ...hswq_core.calibration.observer import is_measured
from ...hswq_core.calibration.states import AUTO, SCHEDULE, Sample, capture
from ...hswq_core.errors import SessionError, SettingError
from ...hswq_core.files.atomic import require_writable
from ..comfyui.patchers import is_compiled
from ..model import inspect_model, layer_modules
from ..sessions.store import add_states
from .record import HookSet, Recorder

if TYPE_CHECKING:
    from ..comfyui.types import ModelExecutor, ModelPatcher, SamplingExecutor

# Arguments of ``apply_model`` after x and sigma, as ComfyUI hands them to its wrappers.
_ARGUMENTS = ("c_concat", "c_crossattn", "control", "transformer_options")
# The transformer_options that belong to a call; the rest are patches, which come with the MODEL.
_OPTIONS = (SCHEDULE,)
# Least time between two reports within a run; calls may follow each other within milliseconds.
REPORT_SECONDS = 1.0


class Calibrator:
    """One session being filled by one MODEL.

    Args:
        record: for the session and the node's model.
        save_every: model calls between saves within a run; the end of a run always saves.
        measure_every: every n-th model call on average is measured, see ``is_measured``; the sample is offered all.
        sample: empty, for the model calls to keep.
        report: called with one line when a run begins, once a second while it lasts, and after each save.
    """

    def __init__(
        self, record: Recorder, save_every: int, measure_every: int, sample: Sample, report: Callable[[str], None]
    ) -> None:
        self.save_every, self.measure_every, self.report = save_every, measure_every, report
        self._record, self._sample = record, sample
        self._reported = 0.0
        self._hooks: dict[int, HookSet] = {}
        self._lock = threading.RLock()
        self._running = 0
        self._in_flight = 0
        self._calls_since_save = self._calls_in_run = 0

    def outer_sample(
        self,
        executor: SamplingExecutor,
        noise: torch.Tensor,
        latent: object,
        sampler: object,
        sigmas: torch.Tensor,
        *a: object,
        **k: object,
    ) -> object:
        """OUTER_SAMPLE wrapper: one sampling run."""
        refuse_compiled(executor.class_obj.model_patcher)
        with self._lock:
            self._running += 1
            self._report()
        try:
            return executor(noise, latent, sampler, sigmas, *a, **k)
        finally:
            with self._lock:
                self._running -= 1
                self._close_run(images=int(noise.shape[0]), steps=max(len(sigmas) - 1, 0))

    def apply_model(self, executor: ModelExecutor, *args: object, **kwargs: object) -> object:
        """APPLY_MODEL wrapper: one call of the diffusion model."""
        if not self._running:  # a guider may run this model outside its own sampling run
            return executor(*args, **kwargs)
        with self._lock:
            diffusion_model = executor.class_obj.diffusion_model
            if id(diffusion_model) not in self._hooks:
                self._hooks[id(diffusion_model)] = HookSet(layer_modules(diffusion_model))
            hooks = self._hooks[id(diffusion_model)]
            hooks.watching = is_measured(self._record.all_calls + self._in_flight, self.measure_every)
            self._in_flight += 1
        completed = False
        try:
            output = executor(*args, **kwargs)
            completed = True
        finally:
            with self._lock:
                hooks.end_call()
                self._in_flight -= 1
                if completed:
                    self._offer(call_arguments(args, kwargs))
                self._close_call(completed)
        return output

    def _offer(self, arguments: dict[str, Any]) -> None:
        """Offer each picture's part of the call to the sample."""
        for row in range(len(arguments["x"])):
            self._sample.offer(partial(capture, arguments, row, whole=frozenset(_OPTIONS)))

    def _close_call(self, completed: bool) -> None:
        self._record.part.calls += completed
        self._calls_since_save += completed
        self._calls_in_run += completed
        # Other threads (MultiGPU) may be in the middle of a call: save when none is.
        if self._calls_since_save >= self.save_every and not self._in_flight:
            self._save(within_a_run=True)
        elif time.monotonic() - self._reported >= REPORT_SECONDS:
            self._report()

    def _close_run(self, images: int, steps: int) -> None:
        for hooks in self._hooks.values():
            hooks.remove()
        self._drain()
        self._hooks.clear()
        part = self._record.part
        if self._calls_in_run:  # not part.calls: a save may just have emptied the part
            self._calls_in_run = 0
            part.images += images
            part.steps[steps] = part.steps.get(steps, 0) + 1
        self._save()

    def _drain(self) -> None:
        for hooks in self._hooks.values():
            self._record.drain(hooks)

    def _save(self, *, within_a_run: bool = False) -> None:
        patience = PATIENCE_WITHIN_A_RUN if within_a_run else PATIENCE
        self._drain()
        self._calls_since_save = 0
        if self._record.refuse_bad():
            self._sample, self._calls_in_run = self._sample.emptied(), 0
        self._record.save(partial(self._add_states, patience), patience)
        self._report()

    def _report(self) -> None:
        self._reported = time.monotonic()
        self.report(self._record.status())

    def _add_states(self, patience: float) -> None:
        """Merge into the states file; in a long session most saves have no new state, and leave it alone."""
        if self._sample.states:
            kept = add_states(self._record.path, self._sample, self._record.info, patience)
            self._sample = self._sample.emptied(kept.ceiling)


def call_arguments(args: tuple[object, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """One flat dict of what ``apply_model`` was called with: x, sigma, conditions, and a call's own options."""
    x, sigma, *rest = args
    named = {**dict(zip(_ARGUMENTS, rest, strict=False)), **kwargs}
    options = named.pop("transformer_options", None) or {}
    return {"x": x, "sigma": sigma, **named, **{name: options.get(name) for name in _OPTIONS}}


def wrapper_key(path: Path) -> str:
    """Key under which a MODEL carries the calibrator of the session at ``path``."""
    return f"hswq:{path}"


def refuse_compiled(patcher: ModelPatcher) -> None:
    """Raise SettingError for a torch.compile'd model: compiled parts do not run the hooks."""
    if is_compiled(patcher):
        raise SettingError(
            "HSWQ Calibration, model",
            got="a model compiled with torch.compile",
            expected="an uncompiled model, whose layers can be observed",
            remedy="Bypass the compile node while calibrating; the converted model can be compiled again.",
        )


def calibrated(
    model: ModelPatcher,
    path: Path,
    save_every: int,
    report: Callable[[str], None],
    states: int = AUTO,
    measure_every: int = 1,
) -> ModelPatcher:
    """A clone of ``model`` whose sampling runs are recorded in the session at ``path``.

    Args:
        save_every, report, measure_every: see ``Calibrator``.
        states: model calls to keep, see ``Sample``.

    Raises:
        HSWQError: compiled or quantized model, a session of another model, an unwritable folder.
    """
    refuse_compiled(model)
    info = inspect_model(model)
    require_writable(path.parent)
    record = Recorder(path, info)
    # Reproducible: the same runs keep the same random calls, whatever the time.
    rng = random.Random(f"{path.stem} {record.calls}")  # noqa: S311 - a sample, no secret
    calibrator = Calibrator(record, save_every, measure_every, Sample(states, rng=rng), report)
    clone = model.clone()
    key = wrapper_key(path)  # two chained nodes record once if of one session, both if of two
    clone.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, key)
    clone.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, key)
    clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, key, calibrator.outer_sample)
    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, key, calibrator.apply_model)
    return clone


def require_recorded(model: ModelPatcher, path: Path) -> None:
    """Raise SessionError if ``model`` comes from a Calibration node that has not seen it draw anything yet.

    Args:
        model: the MODEL at the Converter.
        path: of the session; an existing file is enough, whoever wrote it.
    """
    if not path.exists() and model.wrappers.get(WrappersMP.OUTER_SAMPLE, {}).get(wrapper_key(path)):
        raise SessionError(
            f"Session {path.stem}",
            got="a model that comes from HSWQ Calibration but has drawn nothing yet",
            expected="a picture drawn with it before it is converted",
            remedy="Connect the model output of HSWQ Calibration to the sampler too, and the decoded picture to the "
            "Converter's 'after', so that the picture comes first.",
        )
