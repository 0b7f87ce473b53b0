"""Cancel at every stage: it acts at once, nothing is left behind, and the model draws and converts as before."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hswq.hswq_core.calibration.session import load_session
from hswq.hswq_core.progress import Step
from rig import inprocess, tiny

pytestmark = pytest.mark.comfy

# At which layer, step or plan of the stage.
MODEL_AWARE = {"Drawing": 1, "Watching": 1, "Rounding": 9, "Probing": 9, "Verifying": 2, "Casting": 1, "Writing": 20}
RUNS_THE_MODEL = ("Drawing", "Probing")


class Button:
    """Simulates the page's Cancel button, pressed as soon as a stage is under way.

    Attributes:
        stages: stages reported since then.
    """

    def __init__(self, stage: str, at: int = 1) -> None:
        self._stage, self._left = stage, at
        self.stages: list[str] = []

    def __call__(self, step: Step, _done: int, _total: int) -> None:
        import comfy.model_management

        comfy.model_management.throw_exception_if_processing_interrupted()  # as the nodes' own progress callback does
        if self._left == 0:
            self.stages.append(step.stage)
        elif step.stage == self._stage:
            self._left -= 1
            if self._left == 0:
                comfy.model_management.interrupt_current_processing()


def interrupted(work) -> None:
    import comfy.model_management

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        work()
    assert not comfy.model_management.processing_interrupted()


@pytest.mark.parametrize(
    ("stage", "at"),
    [pytest.param(*row, marks=pytest.mark.compat if row[0] in RUNS_THE_MODEL else ()) for row in MODEL_AWARE.items()],
)
def test_model_aware(calibrated, stage, at):
    settings = {"file_format": "comfy", "fast_matmul": 3.0}
    picture, before, button = draw(calibrated.model), calibrated.files, Button(stage, at)
    interrupted(lambda: calibrated.convert(button, **settings))
    assert not button.stages  # no other stage was started
    assert calibrated.files - before <= {"diffusion_models"}
    assert not calibrated.hooks
    assert torch.equal(draw(calibrated.model), picture)


@pytest.mark.parametrize("stage", ["Searching", "Writing"])
def test_hswq(calibrated, stage):
    before, button = calibrated.files, Button(stage, 2)
    interrupted(lambda: calibrated.convert(button, method="hswq"))
    assert not button.stages
    assert calibrated.files - before <= {"diffusion_models"}


def test_a_conversion_after_a_cancelled_one_is_the_same(calibrated):
    whole = calibrated.convert()
    content = whole.path.read_bytes()
    whole.path.unlink()
    for stage in ("Rounding", "Probing", "Writing"):
        interrupted(lambda stage=stage: calibrated.convert(Button(stage, 5)))
    again = calibrated.convert()
    assert again.path == whole.path
    assert again.path.read_bytes() == content


@pytest.mark.parametrize(
    ("method", "stage"), [("nearest", "Rounding"), ("learned", "Learning"), ("nearest", "Writing")]
)
def test_file_to_file(comfy, tmp_path, method, stage):
    from hswq.hswq_core.convert.file import FileJob, FileRequest

    job = FileJob.open(tiny.make("flux-tiny"), FileRequest.named(method, "v2"))
    button = Button(stage, 2)
    interrupted(lambda: job.write(tmp_path / "x.safetensors", button))
    assert not button.stages
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("at", [1, pytest.param(3, marks=pytest.mark.compat)])
def test_calibrating(comfy, tmp_path, at):
    """Within a model call, as the server's Cancel arrives: completed calls are saved."""
    import comfy.model_management
    from comfy.patcher_extension import WrappersMP
    from hswq.loader.calibration.model import calibrated

    path, calls = tmp_path / "s.pt", []
    model = inprocess.load_model(tiny.make("flux-tiny"))
    picture = draw(model)
    watched = calibrated(model, path, 50, lambda _line: None).clone()

    def press(executor, *args, **kwargs):
        calls.append(1)
        if len(calls) == at:
            comfy.model_management.interrupt_current_processing()
        return executor(*args, **kwargs)

    watched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "press", press)
    interrupted(lambda: draw(watched))
    completed = len(calls) - 1
    assert (load_session(path).calls if path.exists() else 0) == completed
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.model.diffusion_model.modules())
    assert torch.equal(draw(model), picture)
    assert not list(Path(tmp_path).glob("*.tmp"))


def draw(model) -> torch.Tensor:
    return inprocess.sample(model, steps=4, cfg=1.0)
