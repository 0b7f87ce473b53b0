"""Names from a workflow's widgets, and the file names made from them.

Workflows are untrusted: a name must never escape its folder. Allowed: one path component (up to ``MAX_PARTS`` in
``filename_prefix``, separated by slashes of either kind) of printable letters, digits, symbols and inner spaces and
dots, in any script. Not allowed: path syntax, drives and devices of any operating system, invisible and
direction-changing characters, and lookalikes of any of these, such as a full-width solidus.

Links: the folder itself may be a link, which is common with a second disk. Below it no name may lead out through a
link, for reading or for writing: an unpacked archive can contain links.
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
# File systems allow 255 bytes, and the temporary name is longer than the final one.
MAX_FILE_NAME_BYTES = 255 - len(f".xxxxxxxx{TEMPORARY_SUFFIX}")
# Second line: lookalikes of / \ and : that NFKC leaves alone. Third: letters that render as nothing.
_FORBIDDEN = re.compile(
    r'[<>:"/\\|?*\x00-\x1f\x7f]'
    "|[\u2044\u2215\u29f8\u2571\u2216\u29f5\u29f9\u2572\u2236\ua789\u02d0]"
    "|[\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0]"
)
_NUMBERED = re.compile(r"^(.*)_([0-9]{1,3})$")
# Windows device names, reserved with or without an extension.
_RESERVED = re.compile(r"(?i)^(con|prn|aux|nul|conin\$|conout\$|com[\d¹²³]|lpt[\d¹²³]) *(\..*)?$")


def check_name(name: str, what: str) -> str:
    """``name`` if it is one plain, portable path component, else SettingError.

    Args:
        name: what the user typed.
        what: name of the input, for the message.
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
    """Checked as typed and in NFKC form, where a full-width or one-character ".." becomes two dots."""
    return name.isprintable() and all(
        form.strip() and not (_FORBIDDEN.search(form) or _RESERVED.match(form) or form[0] in ". " or form[-1] in ". ")
        for form in (name, unicodedata.normalize("NFKC", name))
    )


def session_path(folder: Path, session: str) -> Path:
    """``<folder>/<session>.pt`` for a checked session name.

    Raises:
        SettingError: not a plain name, or it or a file beside it (states, lock, work folder) links out of the folder.
    """
    path = folder / f"{check_name(session, 'Session name')}.pt"
    for file in (path, *folder.glob(f"{glob.escape(path.stem)}.*")):
        _require_inside(folder, file, "Session name")
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
    """First free path for ``<folder>/<prefix>_<stem>``; existing files are never overwritten.

    Args:
        folder: where loaders look.
        prefix: the user's ``filename_prefix``, may contain subfolders separated by ``/``; empty: no prefix.
        stem: the descriptive part of the name, see ``describe``.

    Raises:
        SettingError: a part of the prefix is not a plain name or links out of the folder, there are too many parts, or
            the whole name is too long for a file system.
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
    while os.path.lexists(path):  # dangling links count too
        path = _short_enough(base.with_name(f"{base.name}_{number}.safetensors"))
        number += 1
    return path


def _require_inside(folder: Path, path: Path, what: str) -> None:
    """Raise SettingError if links lead from ``path`` out of ``folder``; ``folder`` itself may be a link."""
    try:
        inside = path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # a cycle of links
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
    """Name suffix before the format, as in the published files: ``hswq_r<calls>_<budget>``, e.g. ``hswq_r40_0.25``."""
    return f"hswq_r{calls}_{budget}"
