"""Sessions on disk: where they are, and adding to them so that nothing is lost."""

from __future__ import annotations

import copy
from pathlib import Path

import folder_paths

from ...hswq_core.calibration.exclusive import PATIENCE, alone
from ...hswq_core.calibration.predecessor import import_predecessor, is_predecessor
from ...hswq_core.calibration.session import Session, parse_session, read_pt, save_session
from ...hswq_core.calibration.states import Sample
from ...hswq_core.calibration.states_file import load_states, save_states, states_path
from ...hswq_core.files.names import session_path
from ..model import ModelInfo

FOLDER = "hswq_stats"


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
    """A session that has seen nothing yet."""
    # The zeros are shared: merging replaces tensors and never changes them in place.
    return Session(info.family.name, info.fingerprint, {name: copy.copy(stats) for name, stats in info.empty.items()})


def add_to_session(path: Path, part: Session, info: ModelInfo, patience: float = PATIENCE) -> Session:
    """Merge ``part`` into the session at ``path`` and save it; a new file if there is none.

    Args:
        patience: seconds to wait while another process saves it.

    Returns:
        The whole session as saved.

    Raises:
        SessionError: the file there is damaged or of another model, or another process keeps it locked.
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
    """Merge ``part`` into the states of the session at ``session`` and save them; otherwise as ``add_to_session``.

    Returns:
        All states as saved.
    """
    path = states_path(session)
    with alone(session, patience):
        whole = load_states(path, info.fingerprint, part.capacity) if path.exists() else Sample(part.capacity)
        whole.merge(part)
        save_states(whole, info.fingerprint, path)
    return whole
