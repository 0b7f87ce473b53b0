"""Files appear whole or not at all: temporary name in the same folder, fsync, rename.

A process that is killed leaves its temporary file behind; the next that writes the same file removes it. Who still
writes holds a lock on it, which the system takes away with the process.
"""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import FileError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# ComfyUI's loaders list files by extension; this one they ignore.
TEMPORARY_SUFFIX = ".tmp"


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success fsync and rename it to ``path``, else delete it.

    Raises:
        FileError: the folder cannot be made or written to.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path)
        handle, name = tempfile.mkstemp(prefix=f"{path.name}.", suffix=TEMPORARY_SUFFIX, dir=path.parent)
    except OSError as error:
        raise unwritable(path, error) from error
    temporary = Path(name)
    locked = lock(handle)
    try:
        yield temporary
        _sync(temporary)
        # mkstemp makes the file private to its owner; a model or session is shared like any other file.
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)
        if locked:
            os.close(handle)


def _remove_abandoned(path: Path) -> None:
    """Temporary files of ``path`` that nobody writes any more."""
    for file in path.parent.glob(f"{glob.escape(path.name)}.????????{TEMPORARY_SUFFIX}"):
        with contextlib.suppress(OSError):  # gone: another process was faster
            handle = os.open(file, os.O_RDWR)
            if lock(handle):
                file.unlink()
                os.close(handle)


def lock(handle: int) -> bool:
    """Take an open file for this process alone until it is closed; closes it if that cannot be.

    Network drives may have no locks, and Windows removes no file that is open: there nothing is cleared away.
    """
    if fcntl is not None:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    os.close(handle)
    return False


def require_writable(folder: Path) -> None:
    """Raise FileError now rather than after an hour's work if nothing can be written to ``folder``."""
    probe = folder / ".hswq_write_probe"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise unwritable(probe, error) from error


def require_space(folder: Path, size: int) -> None:
    """Raise FileError now rather than when the disk is full; ``folder`` may not exist yet."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < size:
        raise FileError(
            f"Folder {folder}",
            got=f"{free / 1e6:,.0f} MB free",
            expected=f"{size / 1e6:,.0f} MB for the new file",
            remedy="Make room on that disk, or choose another folder.",
        )


def unwritable(path: Path, error: OSError) -> FileError:
    """The one message for a folder that cannot be written to."""
    return FileError(
        f"Folder {path.parent}",
        got=error.strerror or str(error),
        expected=f"to be able to write {path.name}",
        remedy="Free some space, correct the folder's permissions, or choose another output directory.",
    )


def _sync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable; Windows has no folder handles to sync."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
