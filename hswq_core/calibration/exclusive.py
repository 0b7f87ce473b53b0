"""Exclusive access to a session file, taken by calibration, the nodes and the command line before writing it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from ..errors import SessionError
from ..files.locks import locked

# Seconds to wait for another process that is saving the same session: about as long as 512 MB of states take on a slow
# drive (guess). Within a run a hung process must not cost that on every save: the next save includes what was skipped.
PATIENCE, PATIENCE_WITHIN_A_RUN = 20.0, 5.0


def alone(session: Path, patience: float = PATIENCE) -> AbstractContextManager[None]:
    """Make load, merge and save atomic among all processes that write the same session.

    Raises:
        SessionError: another process holds it for longer than ``patience`` seconds.
        FileError: the lock file cannot be created.
    """
    busy = SessionError(
        f"Session {session.stem}",
        got=f"another process that has been saving it for {patience:g} s",
        expected="a second or two",
        remedy="End the ComfyUI that hangs, or choose another session name.",
    )
    return locked(session, patience, busy)


def alone_if_there(session: Path) -> AbstractContextManager[object]:
    """Like ``alone``, for reading; leaves no lock file behind if there is no session."""
    return alone(session) if session.is_file() else nullcontext()
