"""Disks that are full, read-only or gone during calibration and conversion: nothing is lost or half-written."""

from __future__ import annotations

import errno
import os
import shutil
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch
from hswq.hswq_core.calibration.session import load_session
from hswq.hswq_core.calibration.states import MAX_STATES
from hswq.hswq_core.calibration.states_file import load_states, states_path
from hswq.hswq_core.errors import FileError
from hswq.hswq_core.files import atomic
from hswq.hswq_core.progress import Step
from rig import flow, inprocess, tiny
from rig.disk import NoDiskError, fill, largest_file, read_only, small_disk

pytestmark = pytest.mark.comfy

STEPS = 3
Trouble = Callable[[Path], Iterator[None]]


@contextmanager
def limited(_folder: Path) -> Iterator[None]:
    """No file may grow: a limit that any user may set."""
    with largest_file(20_000):
        yield


@contextmanager
def only_sessions_fit(folder: Path) -> Iterator[None]:
    """The session can be written; its states, which are larger, cannot."""
    session, states = folder / "disk.pt", folder / "disk.states.safetensors"
    assert session.stat().st_size * 1.2 < states.stat().st_size
    with largest_file(int(session.stat().st_size * 1.2)):
        yield


@contextmanager
def in_the_way(folder: Path) -> Iterator[None]:
    """A file in place of the folder."""
    aside = folder.rename(folder.with_name("aside"))
    folder.touch()
    yield
    folder.unlink()
    aside.rename(folder)


@contextmanager
def full(folder: Path) -> Iterator[None]:
    """A real full disk."""
    filler = fill(folder)
    yield
    filler.unlink()


@contextmanager
def turned_read_only(folder: Path) -> Iterator[None]:
    """A real disk turned read-only, as after a drive error."""
    read_only(folder, on=True)
    yield
    read_only(folder, on=False)


REAL_DISK = (full, turned_read_only)
TROUBLES = {
    limited: os.strerror(errno.EFBIG),
    only_sessions_fit: os.strerror(errno.EFBIG),
    in_the_way: os.strerror(errno.EEXIST),
    full: os.strerror(errno.ENOSPC),
    turned_read_only: os.strerror(errno.EROFS),
}


@pytest.fixture
def disk(tmp_path) -> Iterator[Callable[[], Path]]:
    """Makes a real disk of 64 MB."""
    with ExitStack() as stack:

        def make() -> Path:
            try:
                return stack.enter_context(small_disk(tmp_path / "disk", 2**26))
            except NoDiskError as error:
                pytest.skip(str(error))

        yield make


@pytest.mark.parametrize(
    "trouble",
    [pytest.param(one, marks=pytest.mark.compat if one is limited else ()) for one in TROUBLES],
    ids=lambda one: one.__name__,
)
def test_a_run_ends_as_ever_and_the_next_save_brings_what_it_saw(comfy, disk, tmp_path, caplog, trouble):
    """Saves after every call, so that the first, middle and last saves of a run hit the trouble."""
    from hswq.loader.calibration.model import calibrated
    from hswq.loader.model import inspect_model

    folder = disk() if trouble in REAL_DISK else tmp_path / "hswq_stats"
    path, lines = folder / "disk.pt", []
    model = inprocess.load_model(tiny.make("flux-tiny"))
    watched = calibrated(model, path, 1, lines.append)
    draw(watched, 0)
    before, told = path.read_bytes(), len(lines)
    with trouble(folder):
        picture, reported = draw(watched, 1), len(lines)
    assert torch.equal(picture, draw(model, 1))
    assert "The statistics are kept in memory until the next save." in caplog.text
    assert f"got {TROUBLES[trouble]}" in caplog.text
    tried = lines[told + 1 : reported]  # the first one is from the start of the run
    assert tried
    assert all(line.endswith(" · saving failed, see the log") for line in tried)
    if trouble is not only_sessions_fit:
        assert path.read_bytes() == before
    assert not list(folder.glob("*.tmp"))
    draw(watched, 2)
    session = load_session(path)
    assert (session.calls, session.images, session.steps) == (3 * STEPS, 3, {STEPS: 3})
    assert {stats.in_calls for stats in session.layers.values()} == {3 * STEPS}
    states = load_states(states_path(path), inspect_model(model).fingerprint, MAX_STATES).states
    assert len(states) == 3 * STEPS
    assert sorted(file.name for file in folder.iterdir() if file.suffix != ".lock") == [
        "disk.pt",
        "disk.states.safetensors",
    ]


def draw(model, prompt: int) -> torch.Tensor:
    return inprocess.sample(model, steps=STEPS, cfg=1.0, size=64, seed=prompt, prompt=prompt, tokens=(64, 64))


def test_a_session_deleted_within_a_run_begins_anew(comfy, tmp_path):
    from hswq.loader.calibration.model import calibrated

    path = tmp_path / "hswq_stats" / "gone.pt"
    watched = calibrated(inprocess.load_model(tiny.make("flux-tiny")), path, 1, lambda _line: None)
    draw(watched, 0)
    shutil.rmtree(path.parent)
    draw(watched, 1)
    assert load_session(path).calls == STEPS


def test_a_running_server_finishes_its_picture_and_saves_later(server):
    """The node is cached and does not run again, so only the save hits the trouble."""
    folder = server.output / "hswq_stats"

    def run(seed: int):
        prompt = flow.calibration(flow.prepare(server, "flux", flow.CALIBRATE, session="later", seed=seed))
        return server.client.run(prompt).check()

    run(1)
    with in_the_way(folder):
        assert run(2).images()
        assert "kept in memory until the next save" in server.tail()
    run(3)
    assert load_session(folder / "later.pt").calls == 6


# Converting

Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize("method", ["hswq", "model_aware"])
def test_room_is_asked_for_before_the_work_begins(calibrated, monkeypatch, method):
    seen, before = [], calibrated.files
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda _path: Usage(10**9, 10**9 - 10**6, 10**6))
    with pytest.raises(FileError, match=r"1e\+06|1 MB free, expected .* MB for .*flux-tiny.*\.safetensors") as caught:
        calibrated.convert(lambda step, *_: seen.append(step), method=method)
    assert "Make room on that disk" in str(caught.value)
    assert not seen
    assert calibrated.files == before | {"diffusion_models"}


def test_room_for_work_and_file_are_asked_for_together(calibrated, monkeypatch):
    """6 MB: either fits, but not both."""
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda _path: Usage(10**9, 10**9 - 6 * 10**6, 6 * 10**6))
    with pytest.raises(FileError, match=r"6 MB free, expected .* MB for .*\.safetensors and small\.work"):
        calibrated.convert()
    done = calibrated.convert(method="hswq", keep_ratio=0.0)
    assert done.size < 6 * 10**6


def test_a_file_conversion_asks_for_room_too(tmp_path, monkeypatch):
    from hswq.hswq_core.convert.file import FileJob, FileRequest

    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda _path: Usage(10**9, 10**9 - 10**6, 10**6))
    job = FileJob.open(tiny.make("flux-tiny"), FileRequest.named("learned", "v2"))
    seen = []
    with pytest.raises(FileError, match="MB free, expected"):
        job.write(tmp_path / "x.safetensors", lambda step, *_: seen.append(step))
    assert not seen
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stage", ["Rounding", "Probing", "Writing"])
def test_a_disk_that_fails_in_the_middle_costs_no_work(calibrated, stage):
    """Finished work is kept for the next attempt; an existing finished file stays as it is."""
    first = calibrated.convert(method="hswq")
    content, before = first.path.read_bytes(), calibrated.files
    with ExitStack() as stack:

        def fail(step: Step, done: int, _total: int) -> None:
            if step.stage == stage and done:
                stack.enter_context(largest_file(1_000))

        with pytest.raises(FileError, match=os.strerror(errno.EFBIG)) as caught:
            calibrated.convert(fail)
    assert "Free some space" in str(caught.value)
    assert first.path.read_bytes() == content
    new = {name for name in calibrated.files - before if "small.work" not in name}
    assert not new
    assert not [name for name in calibrated.files if name.endswith(".tmp")]
    rounded = []
    calibrated.convert(lambda step, *_: rounded.append(step.stage))
    assert rounded.count("Rounding") < 26
    assert stage != "Writing" or not {"Rounding", "Probing"} & set(rounded)
    assert not list(calibrated.output.glob("hswq_stats/*.work"))


def test_a_full_disk_at_the_end_of_a_conversion(calibrated, disk, monkeypatch):
    """With a real full disk."""
    import folder_paths

    folder = disk()
    shutil.copytree(calibrated.output, folder, dirs_exist_ok=True)
    monkeypatch.setattr(folder_paths, "output_directory", str(folder))
    fillers = []

    def fail(step: Step, done: int, _total: int) -> None:
        if step.stage == "Writing" and done and not fillers:
            fillers.append(fill(folder))

    with pytest.raises(FileError, match=r"No space left on device, .* MB free, expected to be able to write .* MB\)"):
        calibrated.convert(fail)
    assert not list((folder / "diffusion_models").iterdir())
    fillers[0].unlink()
    done = calibrated.convert()
    assert done.path.parent == folder / "diffusion_models"
