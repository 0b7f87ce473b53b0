"""Files a stranger might send, each with one thing wrong with it. All are made here: no binary is kept."""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from . import seeds

VERSION = {"s/version": b"3\n", "s/byteorder": b"little"}
Attack = Callable[[Path], object]
SHELL = "cposix\nsystem\n"
DEEP, MANY = 400_000, 1_000_000


def _code(value: Any) -> bytes:
    """A value as operations of a pickle; bytes stand for themselves."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, (tuple, list)):
        inner = b"".join(map(_code, value))
        return b"(" + inner + b"t" if isinstance(value, tuple) else b"](" + inner + b"e"
    if isinstance(value, dict):
        return b"}(" + b"".join(_code(part) for item in value.items() for part in item) + b"u"
    return pickle.dumps(value, 2)[2:-1]


def _tensor(elements: int, shape: Iterable[int], strides: Iterable[int], offset: int = 0) -> bytes:
    """A float64 tensor of storage "0"."""
    storage = _code(("storage", b"ctorch\nDoubleStorage\n", "0", "cpu", elements)) + b"Q"
    hooks = b"ccollections\nOrderedDict\n)R"
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n"
        + _code((storage, offset, tuple(shape), tuple(strides), False, hooks))
        + b"R"
    )


def _pt(value: Any, data: bytes = b"\0" * 8) -> Attack:
    code = b"\x80\2" + _code(value) + b"."
    return lambda path: seeds.archived(path, code, {**VERSION, "s/data/0": data})


def _changed(change: Callable[[dict[str, Any]], object]) -> Attack:
    """A good session with one value changed, saved by torch."""

    def make(path: Path) -> None:
        data = torch.load(seeds.session(path), weights_only=True)
        change(data)
        torch.save(data, path)

    return make


def _zip(*entries: tuple[str, bytes], method: int = zipfile.ZIP_STORED, comment: bytes = b"") -> Attack:
    def make(path: Path) -> None:
        with zipfile.ZipFile(path, "w", method) as archive:
            for name, content in {**VERSION, **dict(entries)}.items():
                archive.writestr(name, content)
            archive.comment = comment

    return make


def _overlapping(path: Path) -> None:
    """60,000 entries for the same 200 KB: 12 GB to whoever reads each."""
    seeds.archived(path, b"\x80\2N.", {"s/data/0": b"\0" * 200_000})
    content = path.read_bytes()
    end = struct.unpack("<4s4H2LH", content[-22:])
    entry = content[end[6] : end[6] + end[5]][-(46 + len("s/data/0")) :]
    directory = b"".join(entry[:-1] + bytes((33 + i % 90,)) for i in range(60_000))
    path.write_bytes(
        content[: end[6]] + directory + struct.pack("<4s4H2LH", end[0], 0, 0, 60_000, 60_000, len(directory), end[6], 0)
    )


def _sparse(size: int) -> Attack:
    def make(path: Path) -> None:
        with path.open("wb") as file:
            file.truncate(size)

    return make


def _wrong_checksum(path: Path) -> None:
    content = bytearray(seeds.session(path).read_bytes())
    content[content.index(b"\x80\2}")] ^= 1
    path.write_bytes(content)


def _legacy(path: Path) -> None:
    torch.save({"type": "hswq_session"}, path, _use_new_zipfile_serialization=False)


def _laughs(path: Path) -> object:
    """A tuple of two tuples of two tuples ...: 2^60 values to whoever prints it."""
    twice = b"".join(b"q" + bytes((i,)) + b"h" + bytes((i,)) + b"\x86" for i in range(60))
    return _pt({"type": "hswq_session", "version": b"K\1" + twice})(path)


def _one_vector(path: Path) -> object:
    """10,000 layers with one vector of 8 MB: 160 GB to whoever adds to them."""
    vector = _tensor(MANY, (MANY,), (1,)) + b"q\xff"
    layers = {str(i): {"abs_sum": b"h\xff"} for i in range(10_000)}
    return _pt({"first": vector, "layers": layers}, b"\0" * 8 * MANY)(path)


SESSIONS: dict[str, Attack] = {
    "an empty file": lambda path: path.write_bytes(b""),
    "a folder": Path.mkdir,
    "300 MB of zeros": _sparse(300 * 2**20),
    "a compressed archive (128 MB in 130 KB)": _zip(
        ("s/data.pkl", b"\x80\2" + _tensor(2**24, (2**24,), (1,)) + b"."),
        ("s/data/0", b"\0" * 2**27),
        method=zipfile.ZIP_DEFLATED,
    ),
    "60,000 entries of one content": _overlapping,
    "65,000 entries": _zip(("s/data.pkl", b"\x80\2N."), *((f"s/data/{i}", b"") for i in range(65_000))),
    "two pickles": _zip(("s/data.pkl", b"\x80\2N."), ("t/data.pkl", b"\x80\2N.")),
    "a pickle outside its folder": _zip(("../../s/data.pkl", b"\x80\2N.")),
    "a comment with another directory": _zip(("s/data.pkl", b"\x80\2N."), comment=b"PK\5\6" + b"\0" * 18),
    "numbers of another byte order": _zip(("s/data.pkl", b"\x80\2N."), ("s/byteorder", b"big")),
    "a wrong checksum": _wrong_checksum,
    "a pickle without an archive": _legacy,
    "a pickle that runs a command": _pt(SHELL.encode() + _code(("true",)) + b"R"),
    "a pickle that makes 8 GB": _pt(b"cbuiltins\nbytearray\n" + _code((2**33,)) + b"R"),
    "a tensor of 16 GB in 8 bytes": _pt(_tensor(1, (2**31,), (1,))),
    "a tensor of 16 GB by strides": _pt(_tensor(1, (2**31,), (0,))),
    "a tensor behind its storage": _pt(_tensor(1, (1,), (1,), offset=2**62)),
    "a tensor of 2^186 values": _pt(_tensor(1, (2**62,) * 3, (1,) * 3)),
    "a storage of other size": _pt(_tensor(2**30, (1,), (1,))),
    "an integer of 2,000 bits": _pt(b"\x8a\xff" + b"\x7f" * 255),
    "an integer of a million digits": _pt(b"\x8b" + struct.pack("<i", 400_000) + b"\x7f" * 400_000),
    "lists in lists, 400,000 deep": _pt(b"]" * DEEP + b"a" * (DEEP - 1)),
    "a 400,000-fold tuple as key": _pt(b"})" + b"\x85" * DEEP + b"Ns"),
    "a list that holds itself": _pt(b"]q\0h\0a"),
    "2^60 values as version": _laughs,
    "a vector for 10,000 layers": _one_vector,
    "eight million marks": _pt(b"(" * 8_000_000),
    "a pickle of 9 MB": _pt("x" * 9_000_000),
    "10,001 layers": _changed(lambda data: data["layers"].update({str(i): {} for i in range(10_001)})),
    "a layer named like a path": _changed(lambda data: data["layers"].update({"../../x": {}})),
    "a layer with terminal codes": _changed(lambda data: data["layers"].update({"\x1b[2J": {}})),
    "a family with a line break": _changed(lambda data: data["meta"].update(family="SDXL\nINFO all is well")),
    "10^308 calls": _changed(lambda data: data["meta"].update(calls=1e308)),
    "a NaN": _changed(lambda data: data["layers"]["in.fc"]["abs_sum"].fill_(torch.nan)),
    "-1 calls": _changed(lambda data: data["layers"]["in.fc"].update(in_calls=-1)),
    "a channel too many": _changed(
        lambda data: data["layers"]["in.fc"].update(abs_sum=torch.ones(4, dtype=torch.float64))
    ),
    "half a matrix for a vector": _changed(
        lambda data: data["layers"]["in.fc"].update(abs_sum=torch.ones(1, 3).half())
    ),
}


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
    """A good file with other states, or more tensors."""

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
    """1,000 states that share 64 MB 60 times each: 4 TB to whoever looks at each."""
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
# No attacks after all: they open.
HARMLESS = {
    "checkpoint: 0 times 2^53 values",
    "checkpoint: 0 times 2^159 values",
    "states: 64 MB shared 60,000 times",
}
