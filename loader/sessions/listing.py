"""What the saved sessions contain, for the page's list of them."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from ...hswq_core.calibration.merge import is_taken
from ...hswq_core.calibration.predecessor import is_predecessor
from ...hswq_core.calibration.session import parse_session, read_pt
from ...hswq_core.calibration.states_file import count_states, states_path
from ...hswq_core.errors import FileError, HSWQError, SettingError
from ...hswq_core.files.names import check_name, free_name
from ..stamp import Stamp
from .store import path_of, sessions_folder

UNREADABLE = "unreadable"
UNUSABLE = "its name cannot be used"
DEFAULT = "session_01"
# Rows cached: a row is small, while reading an SDXL session means 21 MB.
CACHED = 1024

Row = dict[str, Any]


def saved_sessions() -> list[Row]:
    """A row for each ``.pt`` in the sessions' folder, most recently written first, those with a problem last.

    Keys: "name"; "problem", None or why it cannot be used; and for a usable one "family", "model" (the same for the
    same layers), "layers", "calls", "images", "states" (None: no such file, or an unreadable one), "updated" (seconds
    since the epoch). Nothing else about the file system is revealed.
    """
    folder = sessions_folder()
    paths = sorted(folder.glob("*.pt")) if folder.is_dir() else []
    rows = [row for path in paths if (row := _row(path)) is not None]
    return sorted(rows, key=lambda row: (row["problem"] is not None, -row.get("updated", 0.0)))


def next_free(name: str) -> str:
    """The name of a session to begin after ``name``, see ``free_name``."""
    try:
        check_name(name, "Session name")
    except SettingError:
        name = DEFAULT
    folder = sessions_folder()
    return free_name(name, lambda candidate: is_taken(folder, candidate))


def _row(path: Path) -> Row | None:
    """None if the file has disappeared meanwhile."""
    try:
        stamp = Stamp.of(path)
        states = states_path(path)
        return _read(path, stamp, Stamp.of(states) if states.is_file() else None)
    except FileError:
        return None


@lru_cache(maxsize=CACHED)
def _read(path: Path, _stamp: Stamp, states: Stamp | None) -> Row:
    """The row of the file with this stamp."""
    try:
        path_of(path.stem)
        row = _content(path, states is not None)
        json.dumps(row, allow_nan=False)  # a damaged file may hold numbers that JSON cannot express
    except SettingError:
        return {"name": path.stem, "problem": UNUSABLE}
    except (HSWQError, ValueError):
        return {"name": path.stem, "problem": UNREADABLE}
    return row


def _content(path: Path, has_states: bool) -> Row:
    data = read_pt(path)
    row: Row = {"name": path.stem, "problem": None, "states": _states(path) if has_states else None}
    if is_predecessor(data):  # its contents need its model, and are checked on use
        layers = data.get("layers")
        known = {"family": "HSWQ port", "model": "", "layers": len(layers) if isinstance(layers, dict) else 0}
        return row | known | {"calls": None, "images": None, "updated": path.stat().st_mtime}
    session = parse_session(data, path)
    return row | {
        "family": session.family,
        "model": session.fingerprint.layout,
        "layers": len(session.layers),
        "calls": session.calls,
        "images": session.images,
        "updated": session.updated,
    }


def _states(path: Path) -> int | None:
    try:
        return count_states(states_path(path))
    except HSWQError:
        return None
