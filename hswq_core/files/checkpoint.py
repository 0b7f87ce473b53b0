"""Checkpoints on disk as a source of tensors."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open

from ..errors import FileError
from .tensor_header import NAMED_DTYPES, Record, read_records

# Prefixes of a diffusion model's keys: in full checkpoints, and as training tools save them.
CHECKPOINT_PREFIX = "model.diffusion_model."
PREFIXES = (CHECKPOINT_PREFIX, "diffusion_model.")


@dataclass(frozen=True)
class TensorInfo:
    """dtype and shape of a tensor in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return math.prod(self.shape) * self.dtype.itemsize


class TensorSource(Protocol):
    """A source of tensors: a file, or a model in memory with its LoRAs merged."""

    @property
    def name(self) -> str:
        """For messages and file names."""

    @property
    def metadata(self) -> Mapping[str, str]:
        """Of a safetensors header."""

    @property
    def entries(self) -> Mapping[str, TensorInfo]:
        """{key: dtype and shape}, in order."""

    def read(self, key: str) -> torch.Tensor:
        """The tensor ``key`` as ``entries[key]`` describes it."""


class FileSource:
    """A ``.safetensors`` file, read tensor by tensor.

    Args:
        path: the file.
        device: where tensors are returned.

    Raises:
        FileError: not a readable safetensors file, or a dtype that torch lacks.
    """

    def __init__(self, path: Path, device: str = "cpu") -> None:
        self.path, self._device = path, device
        self.name = path.stem
        self.metadata: Mapping[str, str]
        self.entries: Mapping[str, TensorInfo]
        self.metadata, self.entries = read_header(path)
        self._file = safe_open(path, framework="pt", device="cpu")

    def read(self, key: str) -> torch.Tensor:
        """The tensor, on the device."""
        tensor: torch.Tensor = self._file.get_tensor(key)
        return tensor.to(self._device)


def read_header(path: Path) -> tuple[dict[str, str], dict[str, TensorInfo]]:
    """Metadata and {key: info} in the order of the data.

    Raises:
        FileError: see ``FileSource``.
    """
    with readable(path):
        metadata, records = read_records(path)
        with safe_open(path, framework="pt", device="cpu"):  # for the library's own checks
            pass
    return metadata, {key: _info(path, key, record) for key, record in records.items()}


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn errors from reading a safetensors file in the body into FileError."""
    try:
        yield
    except (SafetensorError, OSError, ValueError, KeyError) as error:  # KeyError: a dtype ComfyUI's reader lacks
        raise FileError(
            f"File {path.name}",
            got=f"{type(error).__name__}: {error}",
            expected="a readable .safetensors file",
            remedy="Download or convert the file again; .ckpt and .pt files must be converted to .safetensors first.",
        ) from error


def _info(path: Path, key: str, record: Record) -> TensorInfo:
    dtype = NAMED_DTYPES.get(record.dtype)
    if dtype is None:
        raise FileError(
            f"File {path.name}, tensor {key}",
            got=f"dtype {record.dtype}",
            expected=" or ".join(NAMED_DTYPES),
            remedy="Use the original FP16 or BF16 file of the model.",
        )
    return TensorInfo(dtype, record.shape)


def model_prefix(keys: Iterable[str]) -> str:
    """Prefix of the diffusion model's keys in a file with these keys; "" if there is none."""
    known = list(keys)
    return next((prefix for prefix in PREFIXES if any(key.startswith(prefix) for key in known)), "")


def source_hash(source: TensorSource) -> str:
    """sha256 over keys, dtypes, shapes and metadata of the source: identifies the file without reading 6 GB."""
    lines = [f"{key} {info.dtype} {info.shape}" for key, info in source.entries.items()]
    lines += [f"{key}={value}" for key, value in sorted(source.metadata.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
