"""Validation of JSON and single values from untrusted files.

Everything here raises ValueError, which readers turn into an error that names their file.
"""

from __future__ import annotations

import json
import math
from typing import Any, TypeVar

import torch

T = TypeVar("T")
# Longest name (of a tensor, a layer, a family); the longest in use has 120 characters.
MAX_TEXT = 1000
# float64 represents integers exactly up to here.
MAX_COUNT = 2**53
MAX_DIGITS = 20
SHOWN = 100


def parse_json(source: str, *, finite: bool = True) -> Any:
    """Strict JSON: no duplicate keys, no integers of more than 20 digits, no unbounded nesting.

    The caller must bound its size: a value takes up to 40 times the bytes of its text.

    Args:
        source: the text.
        finite: whether to refuse NaN and infinity, which are not in the standard.
    """
    constant = _constant if finite else float
    try:
        return json.loads(source, object_pairs_hook=_unique, parse_int=_integer, parse_constant=constant)
    except RecursionError as error:
        raise ValueError("JSON nested too deeply") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        raise ValueError("JSON with a key twice")
    return unique


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"JSON with an integer of {len(digits)} digits")
    return int(digits)


def _constant(name: str) -> Any:
    raise ValueError(f"JSON with {name}")


def checked(value: Any, kind: type[T]) -> T:
    """``value``, which must be a ``kind``."""
    if not isinstance(value, kind):
        raise ValueError(f"{shown(value)} where a {kind.__name__} is expected")  # noqa: TRY004 - bad data, not a bug
    return value


def text(value: Any) -> str:
    """A name of printable characters, safe in messages, logs and terminals."""
    if not isinstance(value, str) or not 0 < len(value) <= MAX_TEXT or not value.isprintable():
        raise ValueError(f"{shown(value)} where a name is expected")
    return value


def label(value: Any) -> str:
    """Like ``text``, but may be empty."""
    return text(value) if value != "" else ""


def count(value: Any) -> int:
    """An integer from 0 to 2^53."""
    if type(value) is not int or not 0 <= value <= MAX_COUNT:
        raise ValueError(f"{shown(value)} where a count is expected")
    return value


def number(value: Any) -> float:
    """A finite number, or a one-element tensor holding one."""
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    if type(value) not in (int, float) or not abs(value) < math.inf:
        raise ValueError(f"{shown(value)} where a finite number is expected")
    return float(value)


def shown(value: object) -> str:
    """For messages: the start of a string, or a number; else only the type, since a container may be of any size."""
    if isinstance(value, str):
        return ascii(value[:SHOWN])
    if value is None or (isinstance(value, (bool, int, float)) and abs(value) < 10**MAX_DIGITS):
        return repr(value)
    return f"a {type(value).__name__}"
