"""Checkpoints and recorded calls a stranger might send, each with one thing wrong; see `session_attacks.py`."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from . import seeds
from .session_attacks import MANY, Attack


def _header(text: str | bytes, data: bytes = b"", length: int | None = None) -> Attack:
    raw = text.encode() if isinstance(text, str) else text
    return lambda path: path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)


def _entry(dtype: str = "U8", shape: Any = (4,), begin: Any = 0, end: Any = 4, **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end], **more}


def _tensors(data: bytes = b"\0" * 4, **entries: Any) -> Attack:
    return _header(json.dumps(entries), data)


def _many(path: Path) -> object:
    entries = ",".join(f'"{i}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for i in range(MANY))
    return _header("{" + entries + "}")(path)


def _with(metadata: dict[str, str]) -> Attack:
    def make(path: Path) -> None:
        header, data = seeds.header_of(seeds.checkpoint(path))
        record = json.loads(header)
        record["__metadata__"].update(metadata)
        _header(json.dumps(record), data)(path)

    return make


NESTED = "[" * 100_000 + "]" * 100_000
DIGITS = "9" * 5000
U8 = '{"dtype":"U8","shape":[4],"data_offsets":[0,4]}'
WEIGHT, SCALE = "a.weight", "a.scale"
CHECKPOINTS: dict[str, Attack] = {
    "an empty file": lambda path: path.write_bytes(b""),
    "a folder": Path.mkdir,
    "a header of 2^63 bytes": _header("{}", length=2**63),
    "a header longer than the file": _header("{}", length=100),
    "a header of 48 MB of empty lists": _header('{"x":[' + "[]," * 2**24 + "[]]}"),
    "a million tensors": _many,
    "JSON 100,000 deep": _header('{"x":' + NESTED + "}"),
    "JSON 100,000 deep beside a tensor": _header('{"x":' + U8[:-1] + ',"more":' + NESTED + "}}", b"\0" * 4),
    "an integer of 5,000 digits": _header('{"x":' + U8.replace("4]", f"{DIGITS}]", 1) + "}", b"\0" * 4),
    "NaN for an offset": _header('{"x":' + U8.replace("0,4", "0,NaN") + "}", b"\0" * 4),
    "a name twice": _header('{"x":' + U8 + ',"x":' + U8 + "}", b"\0" * 4),
    "a list for a header": _header("[]"),
    "bytes that are no text": _header(b'{"\xff\xfe":1}'),
    "JSON in UTF-16": _header("{}".encode("utf-16")),
    "half a surrogate": _header('{"\\ud800":' + U8 + "}", b"\0" * 4),
    "a name of terminal codes": _tensors(**{"\x1b]0;x\x07": _entry()}),
    "a name of 10,000 characters": _tensors(**{"x" * 10_000: _entry()}),
    "a name that turns the text around": _tensors(**{"weight\u202e": _entry()}),
    "metadata that is no text": _tensors(__metadata__={"format": 1}, x=_entry()),
    "metadata in a list": _tensors(__metadata__=["format"], x=_entry()),
    "two tensors in one place": _tensors(x=_entry(), y=_entry()),
    "a gap between tensors": _tensors(b"\0" * 12, x=_entry(), y=_entry(begin=8, end=12)),
    "a tensor outside the file": _tensors(x=_entry(end=8, shape=[8])),
    "data behind the last tensor": _tensors(b"\0" * 8, x=_entry()),
    "a shape of more bytes": _tensors(x=_entry(shape=[5])),
    "a shape of 2^64 values": _tensors(x=_entry(shape=[2**32, 2**32])),
    "a negative shape": _tensors(x=_entry(shape=[-4])),
    "two negative dimensions": _tensors(x=_entry(shape=[-2, -2])),
    "0 times 2^53 values": _tensors(b"", **{WEIGHT: _entry("F32", [0, 2**53], end=0)}),
    "0 times 2^159 values": _tensors(b"", **{WEIGHT: _entry("F32", [0, 2**53, 2**53, 2**53], end=0)}),
    "offsets that go back": _tensors(x=_entry(begin=4, end=0)),
    "true for a size": _tensors(b"\0", x=_entry(shape=[True], end=1)),
    "4.0 for a size": _tensors(x=_entry(shape=[4.0])),
    "a million dimensions": _tensors(b"\0", x=_entry(shape=[1] * MANY, end=1)),
    "three offsets": _tensors(x={**_entry(), "data_offsets": [0, 2, 4]}),
    "an entry nobody knows": _tensors(x=_entry(more=1)),
    "a type nobody knows": _tensors(x=_entry("F8_E4M3FNUZ")),
    "no type": _tensors(x={"shape": [4], "data_offsets": [0, 4]}),
    "a weight without dimensions": _tensors(b"\0", **{WEIGHT: _entry("F8_E4M3", [], 0, 1)}),
    "a scale of another size": _tensors(
        b"\0" * 16, **{WEIGHT: _entry("F8_E4M3", [2, 2]), SCALE: _entry("F32", [3], 4, 16)}
    ),
    "hswq: JSON 100,000 deep": _with({"hswq": NESTED}),
    "hswq: a list": _with({"hswq": "[1]"}),
    "hswq: a list for a format": _with({"hswq": '{"version":1,"format":[]}'}),
    "hswq: a version of 5,000 digits": _with({"hswq": '{"version":' + DIGITS + ',"format":"v2"}'}),
    "hswq: a list of counts": _with({"hswq": '{"version":1,"format":"v2","counts":[1]}'}),
    "hswq_plan: JSON 100,000 deep": _with({"hswq_plan": NESTED}),
    "hswq_plan: no text": _with({"hswq_plan": ""}),
    "hswq_plan: layers that are no layers": _with({"hswq_plan": '{"layers":[1]}'}),
    "hswq_plan: a shape of words": _with(
        {"hswq_plan": seeds.PLAN.to_json().replace("[4, 3]", '["a"]').replace("[4,3]", '["a"]')}
    ),
    "hswq_plan: a reason of terminal codes": _with(
        {"hswq_plan": seeds.PLAN.to_json().replace("not used", "\\u001b[2J")}
    ),
    "hswq_plan: a key twice": _with({"hswq_plan": seeds.PLAN.to_json().replace("{", '{"method":"x",', 1)}),
}


def _states(data: bytes = b"", entries: dict[str, Any] | None = None, **changes: Any) -> Attack:
    """A valid file with other states, or with extra tensors."""

    def make(path: Path) -> None:
        header, content = seeds.header_of(seeds.states(path))
        record = json.loads(header)
        own = json.loads(record["__metadata__"]["hswq_states"])
        for name, change in changes.items():
            own[name] = change(own[name]) if callable(change) else change
        record["__metadata__"]["hswq_states"] = json.dumps(own)
        for key, entry in (entries or {}).items():
            record[key] = {**entry, "data_offsets": [offset + len(content) for offset in entry["data_offsets"]]}
        _header(json.dumps(record), content + data)(path)

    return make


def _first(**changes: Any) -> Attack:
    return _states(states=lambda found: [{**found[0], **changes}, *found[1:]])


def _same(found: list[dict[str, Any]], **more: str) -> list[dict[str, Any]]:
    """The last state with other tensors."""
    return [*found[:-1], {**found[-1], "same": {**found[-1]["same"], **more}}]


def _shared(path: Path) -> None:
    """1,000 states that share 64 MB 60 times each: 4 TB for a reader that looks at each."""
    names = {f"a{i}": "0/x" for i in range(60)}
    entries = [{"key": 0.1, "constants": {}, "same": {**names, "x": "0/x", "sigma": "0/sigma"}} for _ in range(1000)]
    header = {"version": 1, "layout": seeds.fingerprint().layout, "states": entries}
    text = json.dumps(
        {
            "__metadata__": {"hswq_states": json.dumps(header)},
            "0/x": _entry("F32", [1, 2**24], 0, 2**26),
            "0/sigma": _entry("F32", [1], 2**26, 2**26 + 4),
        }
    )
    _header(text, b"\0" * (2**26 + 4))(path)


STATES: dict[str, Attack] = {
    "no states": seeds.checkpoint,
    "a version of words": _states(version="x"),
    "another layout of any type": _states(layout=[[[1]]]),
    "5,000 states": _states(states=lambda found: found * 1700),
    "states that are no states": _states(states=[1, 2, 3]),
    "a key of NaN": _first(key="NaN"),
    "a key of 10^308": _first(key=1e308),
    "a constant of lists": _first(constants={"a": [[]]}),
    "constants in a list": _first(constants=[1]),
    "an argument that is taken": _first(constants={"transformer_options": 1}),
    "an argument like a path": _first(constants={"../../x": 1}),
    "an argument twice": _first(constants={"sigma": 1}),
    "a thousand arguments": _first(constants={f"a{i}": 1 for i in range(1000)}),
    "a tensor that is not there": _first(same={"c_crossattn": "9/x"}),
    "a list for a tensor's name": _first(same={"c_crossattn": []}),
    "64 MB shared 60,000 times": _shared,
    "a tensor of no state": _states(b"\0" * 4, {"7/x": _entry()}),
    "a tensor of state ²": _states(b"\0" * 4, {"²/x": _entry()}),
    "a tensor of state 10^5000": _states(b"\0" * 4, {"9" * 500 + "/x": _entry()}),
    "a list and a tensor of one name": _states(b"\0" * 4, {"0/ref": _entry()}),
    "an item that is no number": _states(b"\0" * 4, {"0/ref/x": _entry()}),
    "an empty picture": _states(b"", {"2/y": _entry("F32", [1, 0], 0, 0)}, states=lambda found: _same(found, x="2/y")),
    "a schedule of 40 MB": _states(
        b"\0" * 40_000_000,
        {"2/y": _entry("F32", [10_000_000], 0, 40_000_000)},
        states=lambda found: _same(found, sample_sigmas="2/y"),
    ),
}
# Not attacks after all: these open.
HARMLESS = {
    "checkpoint: 0 times 2^53 values",
    "checkpoint: 0 times 2^159 values",
    "states: 64 MB shared 60,000 times",
}
