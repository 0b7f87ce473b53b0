"""Strict reader for safetensors headers from untrusted files.

Layout: uint64 little-endian header length, JSON header (padded with spaces to 8 bytes), data. The library checks
headers too, but accepts up to 100 MB of JSON and ignores unknown entries; parsed, that could exhaust memory.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .checks import checked, count, parse_json, text

# torch dtype <-> safetensors name; the reverse mapping is derived, so that the two cannot drift.
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
NAMED_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
METADATA_KEY = "__metadata__"
# A converted model of 1000 layers needs 0.5 MB; training metadata and workflows add a few MB at most.
MAX_HEADER_BYTES = 2**24
MAX_RANK = 16
ENTRIES = {"dtype", "shape", "data_offsets"}  # for each tensor


class Record(NamedTuple):
    """A tensor as the header describes it: bytes ``begin`` to ``end`` of the data."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_records(path: Path) -> tuple[dict[str, str], dict[str, Record]]:
    """Metadata and {key: record} in the order of the data.

    Raises:
        ValueError: the header is missing, too large, or inconsistent with itself or with the file size.
        OSError: it cannot be read.
    """
    if not path.is_file():
        raise ValueError("no such file")
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size - 8
        length = int.from_bytes(file.read(8), "little")
        if size < 2 or length > size:
            raise ValueError("shorter than its header")
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"a header of {length:,} bytes, at most {MAX_HEADER_BYTES:,} are read")
        header = checked(parse_json(str(file.read(length), "utf-8")), dict)
    metadata = {key: checked(value, str) for key, value in checked(header.pop(METADATA_KEY, {}), dict).items()}
    records = {text(key): _record(key, value) for key, value in header.items()}
    ordered = sorted(records.items(), key=lambda item: item[1][2:])
    _require_gapless(ordered, size - length)
    return metadata, dict(ordered)


def _record(key: str, value: Any) -> Record:
    entry = checked(value, dict)
    if entry.keys() != ENTRIES:
        raise ValueError(f"tensor {key} with other entries than dtype, shape and data_offsets")
    shape, offsets = checked(entry["shape"], list), checked(entry["data_offsets"], list)
    if len(shape) > MAX_RANK or len(offsets) != 2:
        raise ValueError(f"tensor {key} with {len(shape)} dimensions and {len(offsets)} offsets")
    record = Record(text(entry["dtype"]), tuple(map(count, shape)), *map(count, offsets))
    dtype = NAMED_DTYPES.get(record.dtype)
    size = record.end - record.begin
    if dtype is not None and math.prod(record.shape) * dtype.itemsize != size:
        raise ValueError(f"tensor {key} of shape {record.shape} and dtype {record.dtype} in {size:,} bytes")
    return record


def _require_gapless(records: list[tuple[str, Record]], size: int) -> None:
    offset = 0
    for key, record in records:
        if record.begin != offset or record.end < record.begin:
            raise ValueError(f"tensor {key} at {record.begin}, the one before it ends at {offset}")
        offset = record.end
    if offset != size:
        raise ValueError(f"tensors of {offset:,} bytes in {size:,} bytes of data")
