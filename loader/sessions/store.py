"""Sessions on disk: where they are, and adding to them so that nothing is lost."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import folder_paths
from filelock import FileLock, Timeout

from ...hswq_core.calibration.predecessor import import_predecessor, is_predecessor
from ...hswq_core.calibration.session import Session, parse_session, read_pt, save_session
from ...hswq_core.calibration.states import Sample
from ...hswq_core.calibration.states_file import load_states, save_states, states_path
from ...hswq_core.errors import SessionError
from ...hswq_core.files.atomic import unwritable
from ...hswq_core.files.names import session_path
from ..model import ModelInfo

FOLDER = "hswq_stats"
# Seconds to wait for another process that saves the same session: 512 MB of states on a slow drive take about so
# long. Guess. Within a run a hung process must not cost that at every save: the next one brings it along.
PATIENCE, PATIENCE_WITHIN_A_RUN = 20.0, 5.0


def sessions_folder() -> Path:
    """``output/hswq_stats``."""
    return Path(folder_paths.get_output_directory()) / FOLDER


def path_of(session: str) -> Path:
    """The file of a session name as typed by the user. Raises SettingError for anything but a plain name."""
    return session_path(sessions_folder(), session)


def open_session(path: Path, info: ModelInfo) -> Session:
    """The session at ``path``, which must be of the model ``info``; the predecessor's files are imported.

    Raises:
        SessionError: missing, damaged, or of another model.
    """
    data = read_pt(path)
    if is_predecessor(data):
        return import_predecessor(path, info.empty, info.fingerprint, info.family.name)
    session = parse_session(data, path)
    session.fingerprint.require_same(info.fingerprint, f"Session {path.stem}")
    return session


def new_session(info: ModelInfo) -> Session:
    """A session in which nothing was seen yet."""
    # The zeros are shared: merging replaces tensors and never changes them.
    return Session(info.family.name, info.fingerprint, {name: copy.copy(stats) for name, stats in info.empty.items()})


def alone(session: Path, patience: float = PATIENCE) -> AbstractContextManager[None]:
    """Load, merge and save as one step for all processes that write the same session."""
    busy = SessionError(
        f"Session {session.stem}",
        got=f"another process that has been saving it for {patience:g} s",
        expected="a second or two",
        remedy="End the ComfyUI that hangs, or choose another session name.",
    )
    return locked(session, patience, busy)


@contextmanager
def locked(path: Path, patience: float, busy: SessionError) -> Iterator[None]:
    """Hold the lock beside ``path``, which may be anything's name; raises ``busy`` if another has it for so long.

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


def add_to_session(path: Path, part: Session, info: ModelInfo, patience: float = PATIENCE) -> Session:
    """Merge ``part`` into the session at ``path`` and save it; a new file if there is none.

    Args:
        patience: seconds to wait while another process saves it.

    Returns:
        The whole session as saved.

    Raises:
        SessionError: the file there is damaged or of another model, or another process does not let go of it.
        FileError: it cannot be written.
    """
    with alone(path, patience):
        if path.exists():
            whole = open_session(path, info)
            whole.merge(part)
        else:
            whole = part
        if whole.calls:
            whole.remember()
        save_session(whole, path)
    return whole


def add_states(session: Path, part: Sample, info: ModelInfo, patience: float = PATIENCE) -> Sample:
    """Merge ``part`` into the states of the session at ``session`` and save them; else as ``add_to_session``.

    Returns:
        All states as saved.
    """
    path = states_path(session)
    with alone(session, patience):
        whole = load_states(path, info.fingerprint, part.capacity) if path.exists() else Sample(part.capacity)
        whole.merge(part)
        save_states(whole, info.fingerprint, path)
    return whole
