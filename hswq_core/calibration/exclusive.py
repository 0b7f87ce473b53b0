"""A session's file for one process alone: what calibration, the nodes and the command line all take to write it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from ..errors import SessionError
from ..files.locks import locked

# Seconds to wait for another process that saves the same session: 512 MB of states on a slow drive take about so
# long. Guess. Within a run a hung process must not cost that at every save: the next one brings it along.
PATIENCE, PATIENCE_WITHIN_A_RUN = 20.0, 5.0


def alone(session: Path, patience: float = PATIENCE) -> AbstractContextManager[None]:
    """Load, merge and save as one step for all processes that write the same session.

    Raises:
        SessionError: another process does not let go of it for ``patience`` seconds.
        FileError: the lock's file cannot be made.
    """
    busy = SessionError(
        f"Session {session.stem}",
        got=f"another process that has been saving it for {patience:g} s",
        expected="a second or two",
        remedy="End the ComfyUI that hangs, or choose another session name.",
    )
    return locked(session, patience, busy)


def alone_if_there(session: Path) -> AbstractContextManager[object]:
    """The same to read it; no lock is left where there is no session."""
    return alone(session) if session.is_file() else nullcontext()
