"""Mutations that respect the structure of the input: operations of a pickle, values of JSON."""

from __future__ import annotations

import copy
import json
import pickletools
import random
from contextlib import suppress
from itertools import pairwise
from typing import Any

INTEGERS = (0, 1, -1, 2, 255, 2**16, 2**31 - 1, 2**31, 2**53, 2**53 + 1, 2**63, -(2**63), 10**30)
TEXTS = (
    "",
    "x",
    "../x",
    "a\0b",
    "\x1b[2J",
    "\u202e",
    "é" * 600,
    "F8_E4M3",
    "F32",
    "I64",
    "BOOL",
    "weight",
    "0/x",
    "9/x",
)
VALUES = (*INTEGERS, *TEXTS, None, True, False, 0.5, -1.5, 1e308, -0.0, [], {}, [[]], [0, 0], [0, 2**40])
# Operations found in a pickle of containers, and some that are not.
OPERATIONS = (b"}", b"]", b")", b"(", b"0", b"1", b"2", b"R", b"Q", b"b", b"\x81", b"t", b"u", b"s", b"a", b"e", b"N")
OPERATIONS += (
    b"\x85",
    b"\x86",
    b"\x87",
    b"\x88",
    b"h\0",
    b"h\1",
    b"q\1",
    b"K\0",
    b"J\xff\xff\xff\xff",
    b"\x8a\x08" + b"\xff" * 8,
)
OPERATIONS += (
    b"G" + b"\x7f\xf0" + b"\0" * 6,
    b"G" + b"\x7f\xf8" + b"\0" * 6,
    b"X\1\0\0\0x",
    b"\x8a\x00",
    b"\x8b\xff\xff\xff\x7f",
)
OPERATIONS += (
    b"cbuiltins\neval\n",
    b"cbuiltins\nbytearray\n",
    b"ctorch\nHalfStorage\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n",
)
OPERATIONS += (b"ccollections\nOrderedDict\n", b"J\0\0\0\x7f", b"X\xff\xff\xff\xff", b"M\xff\xff")


def some_bytes(data: bytes, rng: random.Random) -> bytes:
    """One to eight bytes changed, dropped or doubled; for use without a fuzzer."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        at = rng.randrange(len(changed) + 1)
        changed[at : at + rng.randint(0, 2)] = rng.choice(
            (b"", bytes([rng.randrange(256)]), bytes(changed[at : at + 2]) * 2)
        )
    return bytes(changed)


def pickle(data: bytes, rng: random.Random) -> bytes:
    """One to three operations inserted, removed, moved or changed."""
    parts = _operations(data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.randrange(len(parts)) if parts else 0
        way = rng.randrange(5)
        if way == 0 or not parts:
            parts.insert(at, rng.choice(OPERATIONS))
        elif way == 1:
            parts[at] = rng.choice(OPERATIONS)
        elif way == 2:
            del parts[at : at + rng.choice((1, 1, 3, 10))]
        elif way == 3:
            begin = rng.randrange(len(parts))
            parts[at:at] = parts[begin : begin + rng.choice((1, 2, 8, 40))]
        else:
            parts[at] = _other_argument(parts[at], rng)
    return b"".join(parts)


def _operations(data: bytes) -> list[bytes]:
    starts = []
    with suppress(ValueError, IndexError, OverflowError):  # the rest stays in one piece
        starts.extend(position for _, _, position in pickletools.genops(data))
    return [data[begin:end] for begin, end in pairwise((*starts, len(data)))] or [data]


def _other_argument(part: bytes, rng: random.Random) -> bytes:
    if part[:1] in (b"K", b"M", b"J") or len(part) < 2:
        number = rng.choice((0, 1, 3, 127, 255, 65535, 2**31 - 1, -1, -(2**31)))
        return b"J" + number.to_bytes(4, "little", signed=True)
    if part[:1] == b"X":
        text = rng.choice(TEXTS).encode()
        return b"X" + len(text).to_bytes(4, "little") + text
    at = rng.randrange(1, len(part))
    return part[:at] + bytes((rng.randrange(256),)) + part[at + 1 :]


def json_text(data: bytes, rng: random.Random) -> bytes | None:
    """One to three values of a JSON document replaced, moved, wrapped or dropped; None if it is not JSON."""
    try:
        document = json.loads(data)
        for _ in range(rng.choice((1, 1, 2, 3))):
            document = _changed(document, rng)
        return json.dumps(document, separators=(",", ":"), ensure_ascii=rng.random() < 0.5).encode(errors="replace")
    except (ValueError, RecursionError):
        return None


def _changed(document: Any, rng: random.Random) -> Any:
    if rng.random() < 0.15 or not isinstance(document, (dict, list)) or not document:
        return _other(document, rng)
    key = rng.choice(list(document) if isinstance(document, dict) else range(len(document)))
    way = rng.random()
    if way < 0.1:
        del document[key]
    elif way < 0.2 and isinstance(document, dict):
        document[rng.choice(TEXTS)] = copy.deepcopy(document[key])
    elif way < 0.3 and isinstance(document, list):
        document.extend(copy.deepcopy(document[key : key + 8]) * rng.choice((1, 20)))
    else:
        document[key] = _changed(document[key], rng)
    return document


def _other(value: Any, rng: random.Random) -> Any:
    if isinstance(value, str) and rng.random() < 0.5:
        inner = json_text(value.encode(errors="replace"), rng) if value[:1] in ("{", "[") else None
        if inner is not None:
            return inner.decode()
        at = rng.randrange(len(value) + 1)
        return value[:at] + rng.choice(TEXTS) + value[at + rng.randrange(3) :]
    if type(value) is int and rng.random() < 0.5:
        return value + rng.choice((-8, -1, 1, 2, 8))
    wrapped: Any = value
    if rng.random() < 0.1:
        for _ in range(rng.choice((1, 5, 200))):
            wrapped = [wrapped]
        return wrapped
    return copy.deepcopy(rng.choice(VALUES))
