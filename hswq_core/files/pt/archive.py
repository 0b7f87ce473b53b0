"""Members of an uncompressed zip archive as written by ``torch.save``, extracted without trusting it.

Supports only what such archives need: no compression (so nothing can expand), no encryption, no zip64 (sessions are far
smaller), no comment (so the directory is unambiguous), and no duplicate names.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

_END = struct.Struct("<4s4H2LH")  # signature, disk numbers, entries twice, directory's size and offset, comment's size
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_END_SIGN, _ENTRY_SIGN, _LOCAL_SIGN = b"PK\5\6", b"PK\1\2", b"PK\3\4"
_ENCRYPTED, _STORED = 1, 0


def members(data: memoryview) -> dict[str, memoryview]:
    """{name: content}, in directory order; views into ``data``, nothing is copied.

    Raises:
        ValueError: not such an archive, or damaged.
    """
    contents: dict[str, memoryview] = {}
    remaining = len(data)
    for name, content in _entries(data):
        remaining -= len(content)
        if name in contents or remaining < 0:
            raise ValueError("two members of one name or place")
        contents[name] = content
    return contents


def _entries(data: memoryview) -> Iterator[tuple[str, memoryview]]:
    if len(data) < _END.size:
        raise ValueError("too short")
    sign, *_, count, size, offset, comment = _END.unpack(data[-_END.size :])
    if sign != _END_SIGN or comment or offset + size > len(data) - _END.size:
        raise ValueError("no directory at the end")
    directory = data[offset : offset + size]
    for _ in range(count):
        if len(directory) < _ENTRY.size:
            raise ValueError("a directory that ends too early")
        sign, _, _, flags, method, _, _, crc, stored, size, *lengths, _, _, _, start = _ENTRY.unpack_from(directory)
        if sign != _ENTRY_SIGN or method != _STORED or stored != size or flags & _ENCRYPTED:
            raise ValueError("a member that is compressed or encrypted")
        name = str(directory[_ENTRY.size : _ENTRY.size + lengths[0]], "utf-8")
        yield name, _content(data, start, size, crc)
        directory = directory[_ENTRY.size + sum(lengths) :]
    if directory:
        raise ValueError("a directory with something behind it")


def _content(data: memoryview, start: int, size: int, crc: int) -> memoryview:
    if start + _LOCAL.size > len(data):
        raise ValueError("a member outside the file")
    sign, *_, name, extra = _LOCAL.unpack_from(data, start)
    begin = start + _LOCAL.size + name + extra
    content = data[begin : begin + size]
    if sign != _LOCAL_SIGN or len(content) != size:
        raise ValueError("a member outside the file")
    if zlib.crc32(content) != crc:
        raise ValueError("a member with a wrong checksum")
    return content
