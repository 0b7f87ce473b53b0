"""Reads the plain containers and tensors ``torch.save`` writes, without an unpickler: nothing from the file is called.

``torch.load(weights_only=True)`` is not a safe boundary: before release 2.6 it could be made to run code, and it still
allocates tensors and byte arrays of any size at the request of a few bytes. Here a pickle may use some thirty
operations that build dicts, lists, tuples, numbers, strings and tensors; anything else is refused. Memory is bounded by
the file's own size: tensors are views into it, each operation makes at most one small object, and both are limited.
A list or dict can be referenced only once, so nothing contains itself.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .archive import members
from .storages import STORAGE_DTYPES, Storages

# A session of 1000 layers of 4000 channels takes 64 MB, plus 260 bytes and 81 operations per layer.
MAX_FILE_BYTES = 2**28
MAX_PICKLE_BYTES = 2**23
MAX_OPERATIONS = 1_000_000
_PICKLE, _BYTE_ORDER, _STORAGES = "data.pkl", "byteorder", "data/"


@dataclass(frozen=True)
class _Global:
    """A global the pickle refers to: ``dtype`` for a storage class, None for the two supported functions."""

    name: str
    dtype: torch.dtype | None = None


_ORDERED_DICT, _TENSOR = _Global("OrderedDict"), _Global("tensor")
_GLOBALS = {
    ("collections", "OrderedDict"): _ORDERED_DICT,
    ("torch._utils", "_rebuild_tensor_v2"): _TENSOR,
    **{("torch", name): _Global(name, dtype) for name, dtype in STORAGE_DTYPES.items()},
}


def read_containers(path: Path) -> object:
    """What ``torch.save`` wrote to ``path``: dict, list, tuple, str, int, float, bool, None and dense tensors.

    Raises:
        ValueError: anything else, a damaged file, or one over a limit.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_FILE_BYTES:
            raise ValueError(f"{size:,} bytes, at most {MAX_FILE_BYTES:,} are read")
        data = bytearray(size)
        if file.readinto(data) != size:
            raise ValueError("a file that became shorter")
    contents = members(memoryview(data))
    (folder, *others) = [name[: -len(_PICKLE)] for name in contents if name.endswith(f"/{_PICKLE}")] or [""]
    if others or folder.count("/") != 1 or len(contents[folder + _PICKLE]) > MAX_PICKLE_BYTES:
        raise ValueError(f"no {_PICKLE}, or a large one")
    if bytes(contents.get(folder + _BYTE_ORDER, b"little")) != b"little":
        raise ValueError("another byte order")
    start = folder + _STORAGES
    storages = {name[len(start) :]: content for name, content in contents.items() if name.startswith(start)}
    return _Machine(bytes(contents[folder + _PICKLE]), Storages(storages)).run()


class _Machine:
    """Stack machine for a pickle of protocol 2.

    Args:
        code: the pickle.
        storages: the storages its tensors are views of.
    """

    def __init__(self, code: bytes, storages: Storages) -> None:
        self._code, self._at = code, 0
        self._storages = storages
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> object:
        """The single object it builds."""
        code = self._code + b"."  # stops a pickle that lacks its own stop
        for _ in range(MAX_OPERATIONS):
            operation = code[self._at]
            self._at += 1
            if operation == _STOP:
                break
            if operation not in _OPERATIONS:
                raise ValueError(f"operation {operation:#x}, which no plain container needs")
            _OPERATIONS[operation](self)
        else:
            raise ValueError(f"more than {MAX_OPERATIONS:,} operations")
        if len(self.stack) != 1 or self.marks or self._at > len(self._code):
            raise ValueError("not one object")
        return self.stack[0]

    def take(self, size: int) -> bytes:
        """The next bytes of the pickle."""
        begin, self._at = self._at, self._at + size
        if self._at > len(self._code):
            raise ValueError("a pickle that ends too early")
        return self._code[begin : self._at]

    def number(self, size: int, *, signed: bool = False) -> int:
        """The next integer."""
        return int.from_bytes(self.take(size), "little", signed=signed)

    def line(self) -> str:
        """Text up to the next line feed."""
        end = self._code.find(b"\n", self._at, self._at + 100)
        if end < 0:
            raise ValueError("a name that does not end")
        text = str(self.take(end - self._at), "ascii")
        self._at += 1
        return text

    def pop(self) -> Any:
        """Pop the top of the stack, not beyond the last mark."""
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise ValueError("a pickle that takes more than it made")
        return self.stack.pop()

    def since_mark(self) -> list[Any]:
        """Pop everything above the last mark."""
        if not self.marks:
            raise ValueError("no mark")
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def into(self, kind: type) -> Any:
        """The container on top of the stack."""
        if len(self.stack) <= (self.marks[-1] if self.marks else 0) or type(self.stack[-1]) is not kind:
            raise ValueError(f"no {kind.__name__} to fill")
        return self.stack[-1]

    def keep(self, index: int) -> None:
        """Memoize the top of the stack."""
        if not self.stack:
            raise ValueError("nothing to remember")
        self.memo[index] = self.stack[-1]

    def recall(self, index: int) -> None:
        """Push a memoized object."""
        value = self.memo.get(index)
        if isinstance(value, (list, dict)) or index not in self.memo:
            raise ValueError("a container in two places")
        if isinstance(value, torch.Tensor):
            self._storages.spend(value.nbytes)
        self.stack.append(value)

    def call(self) -> None:
        """Call one of the two supported functions: makes an empty dict or a tensor."""
        arguments, function = self.pop(), self.pop()
        if function is _ORDERED_DICT and arguments == ():
            self.stack.append({})
        elif function is _TENSOR and isinstance(arguments, tuple) and len(arguments) in (6, 7):
            self.stack.append(self._storages.tensor(*arguments[:4]))
        else:
            raise ValueError("a call")

    def storage(self) -> None:
        """("storage", class, key, location, elements) becomes the storage as a vector."""
        spec = self.pop()
        if not (isinstance(spec, tuple) and len(spec) == 5 and isinstance(spec[1], _Global) and spec[1].dtype):
            raise ValueError("no storage")
        self.stack.append(self._storages.storage(spec[1].dtype, spec[2], spec[4]))


def _fill_list(machine: _Machine, items: list[Any]) -> None:
    machine.into(list).extend(items)


def _fill_dict(machine: _Machine, items: list[Any]) -> None:
    keys = items[::2]
    # Hashing a deeply nested tuple would crash the process.
    if len(items) % 2 or not all(isinstance(key, (str, int)) for key in keys):
        raise ValueError("a dict with keys that are neither text nor whole numbers")
    machine.into(dict).update(zip(keys, items[1::2], strict=True))


def _global(machine: _Machine) -> None:
    name = machine.line(), machine.line()
    if name not in _GLOBALS:
        raise ValueError(f"a call of {'.'.join(name)!a}")
    machine.stack.append(_GLOBALS[name])


def _protocol(machine: _Machine) -> None:
    if machine.take(1) != b"\2":
        raise ValueError("a pickle of another protocol")


def _long(machine: _Machine) -> None:
    size = machine.number(1)
    if size > 8:
        raise ValueError("a number of more than 64 bits")
    machine.stack.append(machine.number(size, signed=True))


def _last(machine: _Machine, count: int) -> list[Any]:
    return [machine.pop() for _ in range(count)][::-1]


_STOP = ord(".")
_NAMED: dict[bytes, Callable[[_Machine], None]] = {
    b"\x80": _protocol,
    b"(": lambda m: m.marks.append(len(m.stack)),
    b"}": lambda m: m.stack.append({}),
    b"]": lambda m: m.stack.append([]),
    b")": lambda m: m.stack.append(()),
    b"N": lambda m: m.stack.append(None),
    b"\x88": lambda m: m.stack.append(True),
    b"\x89": lambda m: m.stack.append(False),
    b"K": lambda m: m.stack.append(m.number(1)),
    b"M": lambda m: m.stack.append(m.number(2)),
    b"J": lambda m: m.stack.append(m.number(4, signed=True)),
    b"\x8a": _long,
    b"G": lambda m: m.stack.extend(struct.unpack(">d", m.take(8))),
    b"X": lambda m: m.stack.append(str(m.take(m.number(4)), "utf-8")),
    b"q": lambda m: m.keep(m.number(1)),
    b"r": lambda m: m.keep(m.number(4)),
    b"h": lambda m: m.recall(m.number(1)),
    b"j": lambda m: m.recall(m.number(4)),
    b"t": lambda m: m.stack.append(tuple(m.since_mark())),
    b"\x85": lambda m: m.stack.append(tuple(_last(m, 1))),
    b"\x86": lambda m: m.stack.append(tuple(_last(m, 2))),
    b"\x87": lambda m: m.stack.append(tuple(_last(m, 3))),
    b"a": lambda m: _fill_list(m, _last(m, 1)),
    b"e": lambda m: _fill_list(m, m.since_mark()),
    b"s": lambda m: _fill_dict(m, _last(m, 2)),
    b"u": lambda m: _fill_dict(m, m.since_mark()),
    b"c": _global,
    b"R": lambda m: m.call(),
    b"Q": lambda m: m.storage(),
}
_OPERATIONS = {name[0]: operation for name, operation in _NAMED.items()}
