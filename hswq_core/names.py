"""Names that come from a workflow's widgets, and the file names made of them.

A workflow may come from a stranger: a name never leaves the folder it belongs to.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from .atomic import TEMPORARY_SUFFIX
from .errors import SettingError

MAX_LENGTH = 100
MAX_BYTES = 200
# File systems allow 255 bytes; a file is written under a longer name first.
MAX_FILE_NAME_BYTES = 255 - len(f".xxxxxxxx{TEMPORARY_SUFFIX}")
_FORBIDDEN = re.compile(r'[<>:"/\\|?*\x00-\x1f\x7f]')
_NUMBERED = re.compile(r"^(.*)_([0-9]{1,3})$")
# Windows device names, reserved with or without an extension.
_RESERVED = re.compile(r"(?i)^(con|prn|aux|nul|conin\$|conout\$|com[\d¹²³]|lpt[\d¹²³])(\..*)?$")


def check_name(name: str, what: str) -> str:
    """``name`` if it is one plain, portable file-name part, else SettingError.

    Args:
        name: what the user typed.
        what: the input's name, for the message.
    """
    wrong = (
        not name.strip()
        or len(name) > MAX_LENGTH
        or len(name.encode(errors="replace")) > MAX_BYTES
        or not name.isprintable()
        or _FORBIDDEN.search(name)
        or _RESERVED.match(name)
        or name[0] in ". "
        or name[-1] in ". "
    )
    if wrong:
        raise SettingError(
            what,
            got=repr(name[: MAX_LENGTH + 20]),
            expected=f"a plain name of 1-{MAX_LENGTH} characters ({MAX_BYTES} bytes) "
            'without / \\ : * ? " < > | and no dot at either end',
            remedy="Use letters, digits, - and _, for example session_01.",
        )
    return name


def session_path(folder: Path, session: str) -> Path:
    """``<folder>/<session>.pt`` for a checked session name."""
    return folder / f"{check_name(session, 'Session name')}.pt"


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
        while len(base + tail) > MAX_LENGTH or len((base + tail).encode(errors="replace")) > MAX_BYTES:
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
        SettingError: a part of the prefix is no plain name, or the whole name is too long for a file system.
    """
    parts = [check_name(part, "filename_prefix") for part in prefix.replace("\\", "/").split("/")] if prefix else []
    base = folder.joinpath(*parts[:-1]) / ("_".join([*parts[-1:], stem]))
    path = _short_enough(base.with_name(f"{base.name}.safetensors"))
    number = 2
    while path.exists():
        path = _short_enough(base.with_name(f"{base.name}_{number}.safetensors"))
        number += 1
    return path


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
