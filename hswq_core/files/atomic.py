"""Atomic writes: temporary name in the same folder, fsync, rename, fsync of the folder.

A killed process leaves its temporary file behind; the next one that writes to the folder removes it, no matter which
file it was for. A process that is still writing holds a lock on its file, which the system releases when it exits.

Failures to write tensors also report the system's reason: torch's writer calls a full disk "unexpected pos", and the
safetensors library raises its own error class.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ..errors import FileError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# ComfyUI's loaders list files by extension and ignore this one. No other program uses it, so all are safe to delete.
TEMPORARY_SUFFIX = ".hswq.tmp"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) if os.name != "nt" else (errno.ENOSPC,)
_OS_ERROR = re.compile(r"os error (\d+)")


@contextmanager
def atomic_file(path: Path, size: int = 0) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success fsync and rename it to ``path``, else delete it.

    Args:
        path: final name.
        size: bytes about to be written, for the message; 0: unknown.

    Raises:
        FileError: the folder cannot be created or written to, or the disk is full.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        clear_abandoned(path.parent)
        with _temporary_file(path) as temporary:
            yield temporary
            _sync(temporary)
            with contextlib.suppress(OSError):  # file systems without permissions
                # mkstemp makes the file private to its owner; models and sessions get ordinary permissions.
                temporary.chmod(0o666 & ~_umask())
            temporary.replace(path)
            _sync_folder(path.parent)
    except OSError as error:
        raise unwritable(path, error, size) from error


@contextmanager
def _temporary_file(path: Path) -> Iterator[Path]:
    """A new, locked file beside ``path``; deleted on exit unless it was renamed."""
    handle, temporary, locked = _open_temporary(path)
    try:
        yield temporary
    finally:
        with contextlib.suppress(OSError):  # undeletable if the drive went read-only; the error in flight says why
            temporary.unlink(missing_ok=True)
        if locked:
            os.close(handle)


def _open_temporary(path: Path) -> tuple[int, Path, bool]:
    """A new temporary file: handle, path, and whether the handle is still open and locked."""
    while True:
        handle, name = tempfile.mkstemp(prefix=f"{path.name}.", suffix=TEMPORARY_SUFFIX, dir=path.parent)
        if not lock(handle, wait=True):
            return handle, Path(name), False
        if os.fstat(handle).st_nlink:
            return handle, Path(name), True
        os.close(handle)  # another process removed it before it was locked


def clear_abandoned(folder: Path) -> None:
    """Remove temporary files in ``folder`` that no process is writing any more."""
    for file in folder.glob(f"*{TEMPORARY_SUFFIX}"):
        with contextlib.suppress(OSError):  # already removed by another process
            handle = os.open(file, os.O_RDWR)
            if lock(handle):
                try:
                    file.unlink()
                finally:
                    os.close(handle)


def lock(handle: int, *, wait: bool = False) -> bool:
    """Lock an open file exclusively until it is closed; if that fails, close it.

    Network drives may not support locks, and Windows cannot delete open files: nothing is cleaned up there.

    Args:
        wait: block until another process releases it; for files that others hold only briefly.
    """
    if fcntl is not None:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            return True
    os.close(handle)
    return False


def require_writable(folder: Path) -> None:
    """Raise FileError now rather than after an hour's work if ``folder`` is not writable.

    Also removes temporary files left there by killed processes.
    """
    probe = folder / ".hswq_write_probe"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        clear_abandoned(folder)
        probe.touch()
        probe.unlink(missing_ok=True)  # another process may be probing too
    except OSError as error:
        raise unwritable(probe, error) from error


def require_space(needs: Mapping[Path, int]) -> None:
    """Raise FileError up front if the disk lacks space.

    Args:
        needs: {file or folder, which may not exist yet: bytes}; paths on the same disk are added up.
    """
    disks: dict[int, list[Path]] = {}
    for path in needs:
        disks.setdefault(_existing(path).stat().st_dev, []).append(path)
    for paths in disks.values():
        free, size = shutil.disk_usage(_existing(paths[0])).free, sum(needs[path] for path in paths)
        if free < size:
            raise FileError(
                f"Folder {paths[0].parent}",
                got=f"{_megabytes(free)} free",
                expected=f"{_megabytes(size)} for {' and '.join(path.name for path in paths)}",
                remedy="Make room on that disk, or choose another folder.",
            )


def unwritable(path: Path, error: OSError, size: int = 0) -> FileError:
    """The error for a folder that cannot be written to.

    Args:
        path: the file.
        size: its bytes; 0: unknown.
    """
    got, wanted = error.strerror or str(error), f" ({_megabytes(size)})" if size else ""
    if error.errno in NO_ROOM:
        got += f", {_megabytes(shutil.disk_usage(_existing(path)).free)} free"
    return FileError(
        f"Folder {path.parent}",
        got=got,
        expected=f"to be able to write {path.name}{wanted}",
        remedy="Free some space, correct the folder's permissions, or choose another output directory.",
    )


def _existing(path: Path) -> Path:
    """The path, or its nearest existing parent."""
    return next(candidate for candidate in (path, *path.absolute().parents) if candidate.exists())


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f} MB" if size >= 10**7 else f"{size / 1e6:.3g} MB"


def _sync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable where possible.

    Windows has no folder handles to sync, and network drives may refuse. The file already has its name by then;
    reporting a failure would only cause a second save.
    """
    if os.name == "nt":
        return
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def save_pt(data: Mapping[str, Any], path: Path) -> None:
    """``torch.save`` through a memory buffer. Raises FileError if the file cannot be written."""
    buffer = io.BytesIO()
    torch.save(data, buffer)
    with atomic_file(path, buffer.getbuffer().nbytes) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def save_tensors(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    """``safetensors.torch.save_file``. Raises FileError if the file cannot be written."""
    with atomic_file(path, sum(tensor.nbytes for tensor in tensors.values())) as temporary:
        try:
            save_file(tensors, temporary, metadata=metadata)
        except SafetensorError as error:
            number = _OS_ERROR.search(str(error))
            reason = (int(number[1]), os.strerror(int(number[1]))) if number else (str(error),)
            raise OSError(*reason) from error
