"""Checkpoints on disk: a readable source of tensors, and the only writer of a file.

The writer streams: the header is computed beforehand from dtypes and shapes, then one tensor at a time is
produced and written, so that memory holds one layer and never the model.
safetensors layout: uint64 little-endian header length, JSON header (padded with spaces to 8 bytes), data.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open

from .atomic import atomic_file, require_space
from .errors import FileError

# torch dtype <-> safetensors name; the reverse view is derived, so that the two cannot drift.
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
# Of a diffusion model's keys: in whole checkpoints, and as training tools save them.
CHECKPOINT_PREFIX = "model.diffusion_model."
PREFIXES = (CHECKPOINT_PREFIX, "diffusion_model.")
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library


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
    """Where tensors come from: a file, or a model in memory with its LoRAs merged."""

    name: str
    metadata: Mapping[str, str]
    entries: Mapping[str, TensorInfo]

    def read(self, key: str) -> torch.Tensor:
        """The tensor ``key`` as ``entries[key]`` describes it."""


@dataclass(frozen=True)
class OutputTensor:
    """A tensor to be written: described now, produced when its turn comes."""

    key: str
    info: TensorInfo
    produce: Callable[[], torch.Tensor]


class FileSource:
    """A ``.safetensors`` file, read tensor by tensor.

    Raises:
        FileError: not a readable safetensors file, or a dtype torch does not know.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.stem
        self.metadata: Mapping[str, str]
        self.entries: Mapping[str, TensorInfo]
        self.metadata, self.entries = read_header(path)
        self._file = safe_open(path, framework="pt", device="cpu")

    def read(self, key: str) -> torch.Tensor:
        """The tensor on the CPU."""
        tensor: torch.Tensor = self._file.get_tensor(key)
        return tensor


def read_header(path: Path) -> tuple[dict[str, str], dict[str, TensorInfo]]:
    """Metadata and {key: info} in the order of the data, after the library's own checks of the header.

    Raises:
        FileError: see ``FileSource``.
    """
    require_whole(path)
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    metadata = header.pop(METADATA_KEY, {})
    ordered = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    return metadata, {key: _info(path, key, record) for key, record in ordered}


def require_whole(path: Path) -> None:
    """Raise FileError unless ``path`` is a safetensors file with all of its data, as the library checks it."""
    try:
        with safe_open(path, framework="pt", device="cpu"):
            pass
    except (SafetensorError, OSError, ValueError) as error:
        raise FileError(
            f"File {path.name}",
            got=f"{type(error).__name__}: {error}",
            expected="a readable .safetensors file",
            remedy="Download or convert the file again; .ckpt and .pt files must be converted to .safetensors first.",
        ) from error


def _info(path: Path, key: str, record: Mapping[str, object]) -> TensorInfo:
    dtype = NAMED_DTYPES.get(str(record["dtype"]))
    if dtype is None:
        raise FileError(
            f"File {path.name}, tensor {key}",
            got=f"dtype {record['dtype']}",
            expected=" or ".join(NAMED_DTYPES),
            remedy="Use the original FP16 or BF16 file of the model.",
        )
    shape = record["shape"]
    if not isinstance(shape, list):
        raise FileError(f"File {path.name}, tensor {key}", got=shape, expected="a shape", remedy="Download it again.")
    return TensorInfo(dtype, tuple(shape))


def source_hash(source: TensorSource) -> str:
    """sha256 over keys, dtypes, shapes and metadata of the source: names the file without reading 6 GB."""
    lines = [f"{key} {info.dtype} {info.shape}" for key, info in source.entries.items()]
    lines += [f"{key}={value}" for key, value in sorted(source.metadata.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def build_header(tensors: Iterable[OutputTensor], metadata: Mapping[str, str]) -> bytes:
    """Length and JSON header of a file that holds ``tensors`` back to back in this order."""
    header: dict[str, object] = {METADATA_KEY: dict(metadata)} if metadata else {}
    offset = 0
    for tensor in tensors:
        if tensor.key in header or tensor.key == METADATA_KEY:
            raise FileError("Output file", got=f"{tensor.key} twice", expected="every key once", remedy="Report this.")
        end = offset + tensor.info.nbytes
        header[tensor.key] = {
            "dtype": DTYPE_NAMES[tensor.info.dtype],
            "shape": list(tensor.info.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise FileError(
            "Output file, header", got=f"{len(text)} bytes", expected=f"≤ {MAX_HEADER_BYTES}", remedy="Report this."
        )
    return struct.pack("<Q", len(text)) + text


def write_checkpoint(
    path: Path,
    tensors: list[OutputTensor],
    metadata: Mapping[str, str],
    *,
    progress: Callable[[str, int, int], None],
    check: Callable[[Path], None] | None = None,
) -> int:
    """Write atomically, tensor by tensor.

    Args:
        path: final name; nothing appears there unless everything was written and ``check`` passed.
        progress: (what, bytes done, bytes in all) before each tensor; may raise to cancel.
        check: called with the finished temporary file before it gets its name; raises to refuse it.

    Returns:
        Size of the file in bytes.

    Raises:
        FileError: unwritable folder, full disk, or a tensor that is not what it was announced to be.
    """
    header = build_header(tensors, metadata)
    total = sum(tensor.info.nbytes for tensor in tensors)
    require_space(path.parent, len(header) + total)
    with atomic_file(path) as temporary:
        done = 0
        with temporary.open("wb") as file:
            file.write(header)
            for tensor in tensors:
                progress(f"Writing {tensor.key}", done, total)
                file.write(_bytes(tensor))
                done += tensor.info.nbytes
        if check is not None:
            with _reading(f"File {path.name}, written and read again"):
                check(temporary)
        return temporary.stat().st_size


@contextmanager
def _reading(what: str) -> Iterator[None]:
    """An OSError inside is one of reading: the writer around would take it for a full disk."""
    try:
        yield
    except OSError as error:
        raise FileError(
            what,
            got=f"{type(error).__name__}: {error}",
            expected="to be able to read it",
            remedy="Check the drive it is on, then convert again.",
        ) from error


def _bytes(tensor: OutputTensor) -> memoryview:
    with _reading(f"Source of tensor {tensor.key}"):
        data = tensor.produce().detach().to("cpu").contiguous()
    if data.dtype != tensor.info.dtype or tuple(data.shape) != tensor.info.shape:
        raise FileError(
            f"Output tensor {tensor.key}",
            got=f"{data.dtype} {tuple(data.shape)}",
            expected=f"{tensor.info.dtype} {tensor.info.shape}",
            remedy="The source changed while it was read; convert again.",
        )
    return data.reshape(-1).view(torch.uint8).numpy().data if data.numel() else memoryview(b"")
