"""Tensors to files that appear whole or not at all. Where that fails, the system's own reason is told.

torch's writer calls a full disk "unexpected pos", the safetensors library has an error class of its own: either would
pass by those who answer to an unwritable file.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from .atomic import atomic_file

_NUMBER = re.compile(r"os error (\d+)")


def save_pt(data: Mapping[str, Any], path: Path) -> None:
    """``torch.save``, by way of memory. Raises FileError if the file cannot be written."""
    buffer = io.BytesIO()
    torch.save(data, buffer)
    with atomic_file(path, buffer.getbuffer().nbytes) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def save_tensors(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    """``safetensors.torch.save_file``. Raises FileError if the file cannot be written."""
    with atomic_file(path, sum(tensor.nbytes for tensor in tensors.values())) as temporary:
        try:
            save_file(tensors, temporary, metadata=metadata)
        except SafetensorError as error:
            number = _NUMBER.search(str(error))
            reason = (int(number[1]), os.strerror(int(number[1]))) if number else (str(error),)
            raise OSError(*reason) from error
