"""Inter-process locks by file name. (Temporary files being written use a different lock, see ``atomic``.)"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ..errors import HSWQError
from .atomic import unwritable


@contextmanager
def locked(path: Path, patience: float, busy: HSWQError) -> Iterator[None]:
    """Hold the lock beside ``path``, which need not exist; raises ``busy`` if another process keeps it.

    The system releases the lock when its process exits, however it exits; the mere existence of the lock file means
    nothing.

    Args:
        patience: seconds to wait.

    Raises:
        FileError: the lock file cannot be created.
    """
    lock = FileLock(f"{path}.lock", timeout=patience)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise busy from error
    except OSError as error:
        raise unwritable(path, error) from error
    try:
        yield
    finally:
        lock.release()
