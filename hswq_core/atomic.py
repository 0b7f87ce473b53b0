"""Files appear whole or not at all: temporary name in the same folder, fsync, rename."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import FileError

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
        handle, name = tempfile.mkstemp(prefix=f"{path.name}.", suffix=TEMPORARY_SUFFIX, dir=path.parent)
    except OSError as error:
        raise unwritable(path, error) from error
    os.close(handle)
    temporary = Path(name)
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
