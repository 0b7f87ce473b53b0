"""Names that come from a workflow's widgets, and the file names made of them.

A workflow may come from a stranger: a name never leaves the folder it belongs to. What is allowed: one part of a file
name (of ``filename_prefix`` up to ``MAX_PARTS``, divided by slashes of any kind), of printable letters, digits, signs
and inner spaces and dots, in any script. What is not: path parts, drives and devices of any system, invisible and
direction-changing characters, and whatever looks like one of these, such as a full-width solidus.

Links: the folder itself may be a link, as users with a second disk have it. Below it no name may lead out through one,
neither to read nor to write: an unpacked archive can bring links along.
"""

from __future__ import annotations

import glob
import os
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path

from ..errors import SettingError
from .atomic import TEMPORARY_SUFFIX

MAX_LENGTH = 100
MAX_BYTES = 200
MAX_PARTS = 8
# File systems allow 255 bytes; a file is written under a longer name first.
MAX_FILE_NAME_BYTES = 255 - len(f".xxxxxxxx{TEMPORARY_SUFFIX}")
# Then those that look like / \ and : but have no compatible form, and letters that are drawn as nothing.
_FORBIDDEN = re.compile(
    r'[<>:"/\\|?*\x00-\x1f\x7f]'
    "|[\u2044\u2215\u29f8\u2571\u2216\u29f5\u29f9\u2572\u2236\ua789\u02d0]"
    "|[\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0]"
)
_NUMBERED = re.compile(r"^(.*)_([0-9]{1,3})$")
# Windows device names, reserved with or without an extension.
_RESERVED = re.compile(r"(?i)^(con|prn|aux|nul|conin\$|conout\$|com[\d¹²³]|lpt[\d¹²³]) *(\..*)?$")


def check_name(name: str, what: str) -> str:
    """``name`` if it is one plain, portable file-name part, else SettingError.

    Args:
        name: what the user typed.
        what: the input's name, for the message.
    """
    if _is_long(name) or not _plain(name):
        raise SettingError(
            what,
            got=repr(name[: MAX_LENGTH + 20]),
            expected=f"a plain name of 1-{MAX_LENGTH} characters ({MAX_BYTES} bytes) "
            'without / \\ : * ? " < > | or what looks like them, and no dot or space at either end',
            remedy="Use letters, digits, - and _, for example session_01.",
        )
    return name


def _is_long(name: str) -> bool:
    return len(name) > MAX_LENGTH or len(name.encode(errors="replace")) > MAX_BYTES


def _plain(name: str) -> bool:
    """As typed, and as its plainest compatible form: a full-width or one-character ".." is two dots there."""
    return name.isprintable() and all(
        form.strip() and not (_FORBIDDEN.search(form) or _RESERVED.match(form) or form[0] in ". " or form[-1] in ". ")
        for form in (name, unicodedata.normalize("NFKC", name))
    )


def session_path(folder: Path, session: str) -> Path:
    """``<folder>/<session>.pt`` for a checked session name.

    Raises:
        SettingError: no plain name, or it or a file beside it (states, lock, work folder) is a link out of the folder.
    """
    path = folder / f"{check_name(session, 'Session name')}.pt"
    for found in (path, *folder.glob(f"{glob.escape(path.stem)}.*")):
        _require_inside(folder, found, "Session name")
    return path


def free_name(name: str, taken: Callable[[str], bool]) -> str:
    """The first free name after ``name``: session_01 -> session_02, foo -> foo_02.

    Args:
        name: a checked name.
        taken: whether a name is in use.
    """
    numbered = _NUMBERED.match(name)
    base, digits = numbered.groups() if numbered else (name, "01")
    number, free = int(digits), name
    while free == name or taken(free):
        number += 1
        tail = f"_{number:0{len(digits)}}"
        while _is_long(base + tail):
            base = base[:-1]
        free = base + tail
    return free


def output_path(folder: Path, prefix: str, stem: str) -> Path:
    """First free path for ``<folder>/<prefix or stem>``: never over an existing file.

    Args:
        folder: where loaders look.
        prefix: the user's ``filename_prefix``, may name subfolders with ``/``; empty: no prefix.
        stem: the descriptive part of the name, see ``describe``.

    Raises:
        SettingError: a part of the prefix is no plain name or a link out of the folder, there are too many, or the
            whole name is too long for a file system.
    """
    parts = prefix.replace("\\", "/").split("/", MAX_PARTS) if prefix else []
    if len(parts) > MAX_PARTS:
        raise SettingError(
            "filename_prefix",
            got=f"{prefix[:MAX_LENGTH]!r}, more than {MAX_PARTS} folders",
            expected=f"at most {MAX_PARTS}",
            remedy="Shorten filename_prefix.",
        )
    parts = [check_name(part, "filename_prefix") for part in parts]
    base = folder.joinpath(*parts[:-1]) / ("_".join([*parts[-1:], stem]))
    path = _short_enough(base.with_name(f"{base.name}.safetensors"))
    _require_inside(folder, path.parent, "filename_prefix")
    number = 2
    while os.path.lexists(path):  # a link that leads nowhere is in the way too
        path = _short_enough(base.with_name(f"{base.name}_{number}.safetensors"))
        number += 1
    return path


def _require_inside(folder: Path, path: Path, what: str) -> None:
    """Raise SettingError if links lead from ``path`` out of ``folder``, which may be one itself."""
    try:
        inside = path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # links in a circle
        inside = False
    if not inside:
        raise SettingError(
            what,
            got=f"{path.name}, a link that leads out of {folder}",
            expected="files and folders inside it",
            remedy=f"Choose another name, or make {folder.name} itself the link.",
        )


def _short_enough(path: Path) -> Path:
    size = len(path.name.encode(errors="replace"))
    if size > MAX_FILE_NAME_BYTES:
        raise SettingError(
            "Output file name",
            got=f"{size} bytes ({path.name[:40]}...)",
            expected=f"at most {MAX_FILE_NAME_BYTES} bytes",
            remedy="Shorten filename_prefix, or rename the model's file.",
        )
    return path


def describe(calls: int, budget: str) -> str:
    """The published habit's tail, before the format: ``hswq_r<calls>_<budget>``, e.g. ``hswq_r40_0.25``."""
    return f"hswq_r{calls}_{budget}"
