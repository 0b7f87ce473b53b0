from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hswq.hswq_core.errors import FileError
from hswq.hswq_core.files import atomic
from hswq.hswq_core.files.atomic import atomic_file, clear_abandoned, require_space, require_writable
from rig import pack


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_whole_under_its_name(tmp_path):
    path = tmp_path / "new" / "folder" / "model.safetensors"
    with atomic_file(path) as temporary:
        temporary.write_bytes(b"whole")
        assert not path.exists()
    assert path.read_bytes() == b"whole"
    assert names(path.parent) == ["model.safetensors"]


def test_the_temporary_name_is_beside_the_file_and_no_loader_lists_it(tmp_path):
    with atomic_file(tmp_path / "model.safetensors") as temporary:
        assert temporary.parent == tmp_path
        assert temporary.suffix == ".tmp"


def test_an_existing_file_is_replaced(tmp_path):
    path = tmp_path / "session.pt"
    path.write_bytes(b"old")
    with atomic_file(path) as temporary:
        temporary.write_bytes(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, SystemExit, BaseException])
def test_a_failure_or_interrupt_leaves_the_old_file_and_nothing_else(failure, tmp_path):
    def write_half() -> None:
        with atomic_file(path) as temporary:
            temporary.write_bytes(b"half")
            raise failure

    path = tmp_path / "session.pt"
    path.write_bytes(b"old")
    with pytest.raises(failure):
        write_half()
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["session.pt"]


def test_a_full_disk_is_a_file_error_and_leaves_the_old_file(tmp_path, monkeypatch):
    def full(_handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "session.pt"
    path.write_bytes(b"old")
    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(FileError, match=r"No space left on device.*session\.pt"), atomic_file(path) as temporary:
        temporary.write_bytes(b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["session.pt"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no folder handles to sync")
def test_data_reach_the_disk_before_the_name_does_and_the_name_before_the_end(tmp_path, monkeypatch):
    """What survives a power cut: the content, then the rename, then the folder that holds it."""
    path, steps = tmp_path / "model.safetensors", []
    real_sync, real_replace = os.fsync, os.replace

    def fsync(handle: int) -> None:
        found = os.fstat(handle)
        steps.append("folder" if stat.S_ISDIR(found.st_mode) else f"file of {found.st_size} bytes")
        real_sync(handle)

    def replace(source: Path, target: Path) -> None:
        steps.append(f"rename to {Path(target).name}")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    with atomic_file(path) as temporary:
        temporary.write_bytes(b"whole")
    assert steps == ["file of 5 bytes", "rename to model.safetensors", "folder"]


def test_a_drive_that_syncs_no_folders_and_has_no_permissions_is_good_enough(tmp_path, monkeypatch):
    """The file has its name by then: an error would have the caller save the same once more."""

    def refuse(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")

    def forbid(_path: Path, _mode: int) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(atomic.os, "fsync", refuse)
    monkeypatch.setattr(Path, "chmod", forbid)
    with atomic_file(tmp_path / "session.pt") as temporary:
        temporary.write_bytes(b"whole")
    assert (tmp_path / "session.pt").read_bytes() == b"whole"


def test_a_folder_that_is_a_file_is_a_file_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FileError, match="model"), atomic_file(tmp_path / "file" / "model"):
        pass
    with pytest.raises(FileError):
        require_writable(tmp_path / "file")


def test_a_name_taken_by_a_folder_is_a_file_error(tmp_path):
    (tmp_path / "model" / "inside").mkdir(parents=True)
    with pytest.raises(FileError, match="model"), atomic_file(tmp_path / "model"):
        pass
    assert names(tmp_path) == ["model"]


def test_require_writable_makes_the_folder_and_leaves_nothing_in_it(tmp_path):
    folder = tmp_path / "new" / "folder"
    require_writable(folder)
    assert names(folder) == []


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_the_file_has_the_permissions_of_any_new_file(tmp_path):
    ordinary, path = tmp_path / "ordinary", tmp_path / "model"
    ordinary.touch()
    with atomic_file(path):
        pass
    assert path.stat().st_mode == ordinary.stat().st_mode


def test_a_disk_with_too_little_room_is_named_before_anything_is_written(tmp_path):
    free, path = shutil.disk_usage(tmp_path).free, tmp_path / "not" / "yet"
    require_space({path: free // 2})
    with pytest.raises(FileError, match=r"MB free, expected [\d,]+ MB for yet.*Make room"):
        require_space({path: free + 10**12})
    assert names(tmp_path) == []


def test_what_goes_to_one_disk_must_fit_together(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    require_space({tmp_path / "model": free // 2, tmp_path / "work": 0})
    with pytest.raises(FileError, match="for model and work"):
        require_space({tmp_path / "model": free // 2 + 10**9, tmp_path / "work": free // 2})


KILLED = """
import os, signal, sys
sys.path.insert(0, {bench!r})
from rig import pack
pack.alias()
from pathlib import Path
from hswq.hswq_core.files.atomic import atomic_file
with atomic_file(Path({path!r})) as temporary:
    temporary.write_bytes(b"half")
    print(temporary, flush=True)
    {then}
"""


def start(path: Path, then: str) -> subprocess.Popen[str]:
    code = KILLED.format(bench=str(pack.ROOT / "bench"), path=str(path), then=then)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True)


@pytest.mark.skipif(os.name == "nt", reason="Windows removes no open file, and has no flock")
@pytest.mark.parametrize("name", ["model [1].safetensors", "another name.safetensors"])
def test_what_a_killed_process_left_goes_with_the_next_file_of_that_folder(name, tmp_path):
    killed = start(tmp_path / "model [1].safetensors", "os.kill(os.getpid(), signal.SIGKILL)")
    left = Path(killed.communicate()[0].strip())
    assert left.read_bytes() == b"half"
    (tmp_path / "other.safetensors.abcdefgh.tmp").write_bytes(b"of another program")
    with atomic_file(tmp_path / name) as temporary:
        assert not left.exists()
        temporary.write_bytes(b"whole")
    assert names(tmp_path) == sorted([name, "other.safetensors.abcdefgh.tmp"])


@pytest.mark.skipif(os.name == "nt", reason="Windows removes no open file, and has no flock")
def test_what_a_killed_process_left_goes_before_long_work_begins(tmp_path):
    killed = start(tmp_path / "model.safetensors", "os.kill(os.getpid(), signal.SIGKILL)")
    killed.communicate()
    assert len(names(tmp_path)) == 1
    require_writable(tmp_path)
    assert names(tmp_path) == []


@pytest.mark.skipif(os.name == "nt", reason="Windows has no flock")
def test_a_temporary_file_cleared_away_before_it_was_locked_is_made_anew(tmp_path, monkeypatch):
    """Between the two another process may take it for abandoned."""
    real, taken = atomic.lock, []

    def lock(handle: int, *, wait: bool = False) -> bool:
        if wait and not taken:
            taken.extend(tmp_path.iterdir())
            clear_abandoned(tmp_path)
        return real(handle, wait=wait)

    monkeypatch.setattr(atomic, "lock", lock)
    with atomic_file(tmp_path / "session.pt") as temporary:
        assert len(taken) == 1
        assert not taken[0].exists()
        clear_abandoned(tmp_path)
        temporary.write_bytes(b"whole")
    assert names(tmp_path) == ["session.pt"]


@pytest.mark.skipif(os.name == "nt", reason="Windows removes no open file, and has no flock")
def test_what_another_process_still_writes_stays(tmp_path):
    path = tmp_path / "session.pt"
    other = start(path, "sys.stdin.readline()")
    theirs = Path(other.stdout.readline().strip())
    with atomic_file(path) as temporary:
        temporary.write_bytes(b"ours")
    assert theirs.read_bytes() == b"half"
    assert path.read_bytes() == b"ours"
    other.communicate("go on\n")
    assert other.returncode == 0
    assert path.read_bytes() == b"half"
    assert names(tmp_path) == ["session.pt"]
