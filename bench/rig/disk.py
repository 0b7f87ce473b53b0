"""Disks that are too small: a real one where mounting is allowed, otherwise a limit that any user may set."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


class NoDiskError(RuntimeError):
    """This machine does not allow mounting, or has no such limit; the message says why."""


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """Make ``folder`` an empty separate disk of ``size`` bytes. Raises NoDiskError."""
    folder.mkdir(parents=True, exist_ok=True)
    _mount("-t", "tmpfs", "-o", f"size={size}", "none", str(folder))
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def read_only(folder: Path, *, on: bool) -> None:
    """Make a ``small_disk`` read-only, as a failing drive becomes, and back."""
    _mount("-o", f"remount,{'ro' if on else 'rw'}", str(folder))


def fill(folder: Path, left: int = 0) -> Path:
    """Fill a small disk with a file, leaving ``left`` bytes."""
    path = folder / "filler"
    path.write_bytes(bytes(max(0, shutil.disk_usage(folder).free - left)))
    return path


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Limit this process's files to ``size`` bytes: writes fail as on a full disk. Raises NoDiskError."""
    if resource is None:
        raise NoDiskError("this system has no limit on a file's size")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _mount(*arguments: str) -> None:
    if os.name == "nt" or shutil.which("mount") is None:
        raise NoDiskError("this system has no mount")
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise NoDiskError(f"mount: {done.stderr.strip()}")
