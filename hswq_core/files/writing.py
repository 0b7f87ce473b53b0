"""The only writer of model files.

It streams: the header is computed up front from dtypes and shapes, then each tensor is produced while the previous one
is written, so that memory holds two layers and never the whole model.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from ..errors import FileError
from ..progress import Progress, Step
from .atomic import atomic_file, require_space
from .checkpoint import TensorInfo
from .tensor_header import DTYPE_NAMES, MAX_HEADER_BYTES, METADATA_KEY


@dataclass(frozen=True)
class OutputTensor:
    """A tensor to be written: described up front, produced on demand."""

    key: str
    info: TensorInfo
    produce: Callable[[], torch.Tensor]


def build_header(tensors: Iterable[OutputTensor], metadata: Mapping[str, str]) -> bytes:
    """Length and JSON header of a file with ``tensors`` back to back in this order."""
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
            "Output file, header",
            got=f"{len(text):,} bytes",
            expected=f"at most {MAX_HEADER_BYTES:,}, which is what this pack reads",
            remedy="Remove workflows and training metadata from the source's header, or report this.",
        )
    return struct.pack("<Q", len(text)) + text


def write_checkpoint(
    path: Path,
    tensors: list[OutputTensor],
    metadata: Mapping[str, str],
    *,
    progress: Progress,
    check: Callable[[Path], None] | None = None,
) -> int:
    """Write atomically, tensor by tensor: each is produced in this thread while the previous one is written.

    Args:
        path: final name; appears only once everything is written and ``check`` has passed.
        progress: called as (step, bytes done, total bytes) before each tensor; may raise to cancel.
        check: called with the finished temporary file before it is renamed; raises to reject it.

    Returns:
        Size of the file in bytes.

    Raises:
        FileError: unwritable folder, full disk, or a tensor that does not match its description.
    """
    header = build_header(tensors, metadata)
    total = sum(tensor.info.nbytes for tensor in tensors)
    size = len(header) + total
    require_space({path: size})
    with atomic_file(path, size) as temporary:
        done = 0
        with temporary.open("wb") as file, _behind(file) as write:
            write(memoryview(header))
            for tensor in tensors:
                progress(Step("Writing", tensor.key), done, total)
                write(_bytes(tensor))
                done += tensor.info.nbytes
        if check is not None:
            with _reading(f"File {path.name}, written and read again"):
                check(temporary)
        return temporary.stat().st_size


@contextmanager
def _behind(file: BinaryIO) -> Iterator[Callable[[memoryview], None]]:
    """A ``write`` that runs in the background and first waits for the previous one to finish."""
    with ThreadPoolExecutor(1, "hswq-write") as thread:
        pending: Future[int] = thread.submit(file.write, b"")

        def write(data: memoryview) -> None:
            nonlocal pending
            pending.result()
            pending = thread.submit(file.write, data)

        yield write
        pending.result()


@contextmanager
def _reading(what: str) -> Iterator[None]:
    """Report an OSError inside as a read error: the surrounding writer would take it for a full disk."""
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
