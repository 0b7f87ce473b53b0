"""One process at a time at a name. (Temporary files that are being written are marked in another way: ``atomic``.)"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ..errors import HSWQError
from .atomic import unwritable


@contextmanager
def locked(path: Path, patience: float, busy: HSWQError) -> Iterator[None]:
    """Hold the lock beside ``path``, which may be anything's name; raises ``busy`` if another process keeps it.

    The system takes the lock away with the process that holds it, however that ends; the lock's file says nothing.

    Args:
        patience: seconds to wait.

    Raises:
        FileError: the lock's file cannot be made.
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
