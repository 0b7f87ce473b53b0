"""Tensors as views into the bytes a ``.pt`` actually contains."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
MAX_RANK = 8


@dataclass(frozen=True)
class Storage:
    """Memory that tensors are views of; not itself a tensor of the file."""

    vector: torch.Tensor


class Storages:
    """The storages of a file, each read on first use. All methods raise ValueError for anything that is not there.

    Args:
        contents: {key: bytes of a storage}, writable.
    """

    def __init__(self, contents: Mapping[str, memoryview]) -> None:
        self._contents, self._read = contents, dict[str, Storage]()
        # Tensors may share storages, in part or whole, but must not add up to many times the file.
        self._budget = 2 * sum(map(len, contents.values()))

    def storage(self, dtype: torch.dtype, key: Any, elements: Any) -> Storage:
        """The storage ``key``, which must have exactly this many elements of this dtype."""
        if not isinstance(key, str) or key not in self._contents or type(elements) is not int:
            raise ValueError("a storage that is not there")
        content = self._contents[key]
        if elements < 0 or elements * dtype.itemsize != len(content):
            raise ValueError(f"a storage of {len(content)} bytes, not of {elements} elements")
        if key not in self._read:
            self._read[key] = Storage(_vector(content, dtype))
        if self._read[key].vector.dtype != dtype:
            raise ValueError("a storage of two types")
        return self._read[key]

    def tensor(self, storage: Any, offset: Any, shape: Any, strides: Any) -> torch.Tensor:
        """A dense view into a storage."""
        if not isinstance(storage, Storage) or not (_naturals((offset,)) and _naturals(shape)):
            raise ValueError("no tensor")
        vector, size = storage.vector, math.prod(shape[:MAX_RANK])
        if len(shape) > MAX_RANK or offset + size > len(vector) or (not size and len(shape) != 1):
            raise ValueError(f"a tensor of {len(shape)} dimensions that its storage does not hold")
        dense = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        if not _naturals(strides) or len(strides) != len(shape):
            raise ValueError("no tensor")
        if any(n > 1 and stride != step for n, stride, step in zip(shape, strides, dense, strict=True)):
            raise ValueError("a tensor that is not dense")
        self.spend(size * vector.itemsize)
        return vector[offset : offset + size].view(shape)

    def spend(self, size: int) -> None:
        """Count a tensor's bytes, even for one that was already built: callers may copy each."""
        self._budget -= size
        if self._budget < 0:
            raise ValueError("tensors of many times the file's size")


def _vector(content: memoryview, dtype: torch.dtype) -> torch.Tensor:
    """The bytes in place, or a copy if they are misaligned for the dtype."""
    if not content:
        return torch.empty(0, dtype=dtype)
    vector = torch.frombuffer(content, dtype=dtype)
    return vector.clone() if vector.data_ptr() % dtype.itemsize else vector


def _naturals(numbers: Any) -> bool:
    return isinstance(numbers, tuple) and all(type(n) is int and n >= 0 for n in numbers)
