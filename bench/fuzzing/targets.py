"""Fuzz targets, one row each: how an input becomes a file, and which readers must accept or refuse it.

A reader may raise only this pack's own errors, and an error about a file must name it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from hswq.hswq_core.calibration.predecessor import import_predecessor, is_predecessor
from hswq.hswq_core.calibration.session import parse_session, read_pt
from hswq.hswq_core.calibration.states_file import load_states
from hswq.hswq_core.convert.header import HEADER_KEY, PLAN_KEY, declared_format, declared_plan
from hswq.hswq_core.errors import HSWQError, SettingError
from hswq.hswq_core.files.names import output_path, session_path
from hswq.hswq_core.plan.formats import marker_record
from hswq.hswq_core.reports.inspect import QuantizedFile, compare, findings

from . import mutate, seeds

NAME = "hostile"
Mutation = Callable[[bytes, random.Random], "bytes | None"]


@dataclass(frozen=True)
class Target:
    """One row.

    Attributes:
        run: called with an input and a folder for files; raises anything that must not reach a user.
        seeds: called with a folder; returns valid inputs.
        mutation: used besides the fuzzer's own on bytes, or None.
    """

    run: Callable[[bytes, Path], None]
    seeds: Callable[[Path], list[bytes]]
    mutation: Mutation | None = None


def refusal(path: Path, read: Callable[[Path], object]) -> str | None:
    """The error that ``read(path)`` raises, or None; only our own errors, which name the file, are allowed."""
    try:
        read(path)
    except HSWQError as error:
        text = str(error)
        if path.name not in text or not text.isprintable() or len(text) > 10_000:
            raise AssertionError(ascii(text[:1000])) from error
        return text
    return None


def read_session(path: Path) -> object:
    """Read a session as the nodes open it, then as it is merged and read by the methods."""
    data = read_pt(path)
    if is_predecessor(data):
        return import_predecessor(path, seeds.empty_layers(), seeds.fingerprint(), "generic")
    session = parse_session(data, path)
    session.merge(session)
    return session.summary(), [(stats.sensitivity, stats.importance) for stats in session.layers.values()]


def read_states(path: Path) -> object:
    """Read states as the converter does."""
    found = load_states(path, seeds.fingerprint(), 4)
    return [(state.arguments("cpu"), state.mark, state.prompt) for state in found.states]


def read_checkpoint(path: Path) -> list[str]:
    """Read a checkpoint as the command line inspects, verifies and compares it; returns what these report."""
    file = QuantizedFile(path)
    readers = (lambda _: list(compare(file, file)), lambda _: declared_plan(file.source.metadata, path.name))
    refused = [text for read in readers if (text := refusal(path, read))]
    return [*refused, *findings(path)]


def _session(data: bytes, folder: Path) -> None:
    """The first byte selects whose archive the pickle is put into."""
    known = _templates(folder)
    refusal(seeds.archived(folder / f"{NAME}.pt", data[1:], known[data[0] % len(known) if data else 0]), read_session)


def _archive(data: bytes, folder: Path) -> None:
    path = folder / f"{NAME}.pt"
    path.write_bytes(data)
    refusal(path, read_session)


def _file(data: bytes, folder: Path, read: Callable[[Path], object]) -> None:
    """First byte even: the rest is the JSON header of a file with as much data as it asks for; odd: the file itself."""
    path = folder / f"{NAME}.safetensors"
    if data and data[0] % 2:
        path.write_bytes(data[1:])
    else:
        path.write_bytes((len(data[1:])).to_bytes(8, "little") + data[1:] + b"8" * _asked(data[1:]))
    refusal(path, read)


def _asked(header: bytes) -> int:
    try:
        ends = [record["data_offsets"][1] for key, record in json.loads(header).items() if key != "__metadata__"]
        return min(max(ends, default=0), 2**16) if all(type(end) is int for end in ends) else 0
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return 0


def _json(data: bytes, folder: Path) -> None:
    text = data.decode(errors="replace")
    refusal(folder / NAME, lambda path: declared_format({HEADER_KEY: text}, path.name))
    refusal(folder / NAME, lambda path: declared_plan({PLAN_KEY: text}, path.name))
    try:
        marker_record(torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0))
    except ValueError:
        return  # the loader names the file and tensor


def _names(data: bytes, folder: Path) -> None:
    text = data.decode(errors="surrogateescape")
    root = folder.resolve()
    for make in (session_path, partial(output_path, stem="stem")):
        with suppress(SettingError):
            path = make(folder, text)
            if (
                ".." in path.parts
                or not path.resolve().is_relative_to(root)
                or text.replace("\\", "/").rpartition("/")[2] not in path.name
            ):
                raise AssertionError(ascii(path))


_TEMPLATES: dict[Path, list[dict[str, bytes]]] = {}


def _templates(folder: Path) -> list[dict[str, bytes]]:
    if folder not in _TEMPLATES:
        made = (seeds.session(folder / "seed.pt"), seeds.predecessor(folder / "seed.pt"))
        _TEMPLATES[folder] = [
            seeds.pickle_of(make(folder / "seed.pt"))[1] for make in (seeds.session, seeds.predecessor)
        ]
        made[0].unlink()
    return _TEMPLATES[folder]


def _pickles(folder: Path) -> list[bytes]:
    makers = (seeds.session, seeds.predecessor)
    return [bytes((i,)) + seeds.pickle_of(make(folder / "seed.pt"))[0] for i, make in enumerate(makers)]


def _whole(folder: Path, *makers: Callable[[Path], Path]) -> list[bytes]:
    return [make(folder / "seed").read_bytes() for make in makers]


def _headers(folder: Path, make: Callable[[Path], Path]) -> list[bytes]:
    return [b"\0" + seeds.header_of(make(folder / "seed"))[0], b"\1" + (folder / "seed").read_bytes()]


def _texts(_folder: Path) -> list[bytes]:
    record = {"version": 1, "format": "v2", "counts": {"quantize": 2}, "session": {"calls": 2}}
    marker = {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}
    return [json.dumps(record).encode(), json.dumps(marker).encode(), seeds.PLAN.to_json().encode()]


def _spellings(_folder: Path) -> list[bytes]:
    names = ("session_01", "a/b", "..", "C:\\x", "con.txt", "モデル", "v1.5", "\u202e", "／", "x" * 300, "a\\b\\..\\c")
    return [name.encode() for name in names]


def _behind_first(mutation: Mutation) -> Mutation:
    def changed(data: bytes, rng: random.Random) -> bytes | None:
        if not data or (mutation is mutate.json_text and data[0] % 2):
            return None
        found = mutation(data[1:], rng)
        return None if found is None else data[:1] + found

    return changed


TARGETS = {
    "session": Target(_session, _pickles, _behind_first(mutate.pickle)),
    "archive": Target(_archive, lambda folder: _whole(folder, seeds.session, seeds.predecessor)),
    "checkpoint": Target(
        partial(_file, read=read_checkpoint),
        lambda folder: _headers(folder, seeds.checkpoint),
        _behind_first(mutate.json_text),
    ),
    "states": Target(
        partial(_file, read=read_states), lambda folder: _headers(folder, seeds.states), _behind_first(mutate.json_text)
    ),
    "json": Target(_json, _texts, mutate.json_text),
    "names": Target(_names, _spellings),
}
