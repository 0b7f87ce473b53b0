"""Disks that cannot take what is saved: one error, with the reason and the bytes; the old file stays, nothing else."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hswq.hswq_core.errors import FileError
from hswq.hswq_core.files.atomic import save_pt, save_tensors
from hswq.hswq_core.files.checkpoint import TensorInfo
from hswq.hswq_core.files.writing import OutputTensor, write_checkpoint
from hswq.hswq_core.methods.solutions import Solutions
from hswq.hswq_core.methods.solve import Solution
from hswq.hswq_core.progress import no_progress
from hswq.hswq_core.quant.grid import FLOAT8_E4M3FN
from rig.disk import NoDiskError, fill, largest_file, read_only, small_disk

COUNT = 2**16
Save = Callable[[Path, int], object]


def pt(path: Path, count: int) -> None:
    save_pt({str(i): torch.ones(count) for i in range(4)}, path)


def tensors(path: Path, count: int) -> None:
    save_tensors({str(i): torch.ones(count) for i in range(4)}, path, {"a": "b"})


def model(path: Path, count: int) -> None:
    info = TensorInfo(torch.float32, (count,))
    outputs = [OutputTensor(str(i), info, lambda: torch.ones(count)) for i in range(4)]
    write_checkpoint(path, outputs, {}, progress=no_progress)


WRITERS = {"session": pt, "states": tensors, "model": model}


@pytest.fixture(params=WRITERS)
def save(request) -> Save:
    return WRITERS[request.param]


@pytest.fixture
def disk(tmp_path):
    """A real one of 256 kB."""
    try:
        with small_disk(tmp_path / "disk", 2**18) as folder:
            yield folder
    except NoDiskError as error:
        pytest.skip(str(error))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def refused(save: Save, path: Path, *words: str, count: int = COUNT) -> None:
    """The old file stays, and nothing else is left."""
    old, there = path.read_bytes(), names(path.parent)
    with pytest.raises(FileError) as caught:
        save(path, count)
    for word in (path.name, str(path.parent), *words):
        assert word in str(caught.value)
    assert path.read_bytes() == old
    assert names(path.parent) == there


def test_a_file_that_may_not_grow(save, tmp_path):
    """As on a full disk; nobody needs rights for it."""
    path = tmp_path / "file"
    save(path, 4)
    with largest_file(100_000):
        refused(save, path, os.strerror(errno.EFBIG), "1.05 MB", "MB free", "Free some space")
    save(path, COUNT)
    assert path.stat().st_size > 4 * 4 * COUNT


def test_a_disk_that_is_full(save, disk):
    path = disk / "file"
    save(path, 4)
    refused(save, path, "1.05 MB", "MB free")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no folder handles to sync")
def test_what_is_written_is_on_the_disk_before_it_has_its_name(save, tmp_path, monkeypatch):
    """A power cut leaves the old file or the new one: content, then rename, then folder."""
    path, steps = tmp_path / "file", []
    real_sync, real_replace = os.fsync, os.replace

    def fsync(handle: int) -> None:
        found = os.fstat(handle)
        steps.append("folder" if stat.S_ISDIR(found.st_mode) else found.st_size)
        real_sync(handle)

    def replace(source: Path, target: Path) -> None:
        steps.append("rename")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    save(path, COUNT)
    assert steps == [path.stat().st_size, "rename", "folder"]


@pytest.mark.parametrize("writer", [pt, tensors])
def test_a_disk_that_fills_up_meanwhile(writer, disk):
    path = disk / "file"
    writer(path, 4)
    filler = fill(disk, left=2**13)
    refused(writer, path, os.strerror(errno.ENOSPC), "1.05 MB", "0.00819 MB free")
    filler.unlink()
    writer(path, 2**12)
    assert path.stat().st_size > 4 * 4 * 2**12


def test_a_drive_that_turns_read_only(save, disk):
    path = disk / "file"
    save(path, 4)
    read_only(disk, on=True)
    refused(save, path, os.strerror(errno.EROFS), "permissions", count=8)
    read_only(disk, on=False)
    save(path, 8)
    assert names(disk) == ["file"]


def test_a_folder_that_vanishes_is_made_again(save, tmp_path):
    path = tmp_path / "folder" / "file"
    save(path, 4)
    path.unlink()
    path.parent.rmdir()
    save(path, 4)
    assert names(path.parent) == ["file"]


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root feels no permissions")
def test_a_folder_that_one_may_not_write_to(save, tmp_path):
    path = tmp_path / "file"
    save(path, 4)
    tmp_path.chmod(0o500)
    try:
        refused(save, path, os.strerror(errno.EACCES), "permissions")
    finally:
        tmp_path.chmod(0o700)


def test_work_that_does_not_fit_keeps_what_was_done(tmp_path):
    done = Solutions.resumed(tmp_path / "s.work", "key")
    done.add("small", _solution(4))
    with largest_file(10_000), pytest.raises(FileError, match=os.strerror(errno.EFBIG)):
        done.add("large", _solution(COUNT))
    assert set(Solutions.resumed(tmp_path / "s.work", "key")) == {"small"}
    assert len(names(done.folder)) == 1


def _solution(count: int) -> Solution:
    return Solution("fp8_cast", {"weight": torch.zeros(count, 1).to(FLOAT8_E4M3FN.dtype)}, "nearest", None, 0.5, 0.5)
