"""Sessions merged by name: their sum as a new session."""

from __future__ import annotations

import logging
from pathlib import Path

from ...hswq_core.calibration.exclusive import alone
from ...hswq_core.calibration.merge import Merged, equal, merge_files, save_merged, taken
from ...hswq_core.calibration.session import load_session
from ...hswq_core.errors import SettingError
from .store import path_of

log = logging.getLogger(__name__)


def session_names(text: str) -> list[str]:
    """The session names in ``text``, one per line, or several separated by commas.

    Raises:
        SettingError: fewer than two, one twice, or not a plain name.
    """
    # A line that as a whole is a session's name may contain commas.
    lines = [line.strip() for line in text.splitlines()]
    names = [name.strip() for line in lines for name in ([line] if _is_session(line) else line.split(","))]
    names = [name for name in names if name]
    for name in names:
        path_of(name)
    twice = sorted({name for name in names if names.count(name) > 1})
    if len(names) < 2 or twice:
        raise SettingError(
            "sessions",
            got=f"{', '.join(twice)} twice" if twice else f"{len(names)} names",
            expected="two or more different session names, one a line",
            remedy="Remove the repetition: it would count twice." if twice else "Add a line.",
        )
    return names


def merge_named(sessions: str, name: str) -> str:
    """Save the sum of ``sessions``, see ``session_names``, as the session ``name``; returns a report.

    Saving the same sum under the same name again is not an error, and changes nothing.

    Raises:
        SettingError: wrong names, or ``name`` is taken.
        SessionError: missing, damaged, of different models, or two that hold the same recordings.
        FileError: the folder cannot be written to.
    """
    target, paths = path_of(name), [path_of(part) for part in session_names(sessions)]
    if target in paths:
        raise taken(target)
    merged = merge_files(paths)
    with alone(target):
        outcome = _same(target, merged) or _save(target, merged)
    report = f"{merged.report(name)}\n{outcome}"
    log.info("HSWQ: %s", report.replace("\n", "; "))
    return report


def _is_session(line: str) -> bool:
    try:
        return path_of(line).is_file()
    except SettingError:
        return False


def _same(target: Path, merged: Merged) -> str:
    """What to report if ``merged`` is already saved as ``target``; "" if nothing is there."""
    if not target.exists():
        return ""
    if not equal(load_session(target), merged.session):
        raise taken(target)
    return "It was there already, made of the very same sessions."


def _save(target: Path, merged: Merged) -> str:
    save_merged(merged, target)
    return "Saved."
