"""Sessions a stranger might send, each with one thing wrong. All are made here: no binary is stored."""

from __future__ import annotations

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
    """A value as pickle operations; bytes stand for themselves."""
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
    """A valid session with one value changed, saved by torch."""

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
    """60,000 entries for the same 200 KB: 12 GB for a reader that reads each."""
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
    """A tuple of two tuples of two tuples ...: 2^60 values for code that prints it."""
    twice = b"".join(b"q" + bytes((i,)) + b"h" + bytes((i,)) + b"\x86" for i in range(60))
    return _pt({"type": "hswq_session", "version": b"K\1" + twice})(path)


def _one_vector(path: Path) -> object:
    """10,000 layers with one vector of 8 MB: 160 GB for code that adds to them."""
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
