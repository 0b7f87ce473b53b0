"""How to open a file, and which file that was."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ..hswq_core import FileError, SettingError
from .lora import EXACT, LORA_MODES

AUTO = "auto"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Opening:
    """How to open a file.

    Attributes:
        lora: "exact" or "stock", see ``loader.lora``.
        dequantize_dtype: what FP8 weights become for each call and the model computes in: a key of ``DTYPES``, or
            "auto", ComfyUI's choice for the model and the device.
        fp8_matmul: multiply in FP8 where the device can and the file has an ``input_scale``.
    """

    lora: str = EXACT
    dequantize_dtype: str = AUTO
    fp8_matmul: bool = True

    def __post_init__(self) -> None:
        for name, value, known in (
            ("lora", self.lora, LORA_MODES),
            ("dequantize_dtype", self.dequantize_dtype, (AUTO, *DTYPES)),
        ):
            if value not in known:
                raise SettingError(name, got=repr(value), expected=" or ".join(known), remedy="Choose one of them.")


@dataclass(frozen=True)
class Stamp:
    """What tells a file from another that has taken its name: bytes, time of change, inode."""

    size: int
    changed: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> Stamp:
        """Stamp of the file that has this name now.

        Raises:
            FileError: there is none.
        """
        try:
            found = path.stat()
        except OSError as error:
            raise FileError(
                f"File {path.name}",
                got=f"{type(error).__name__}: {error.strerror}",
                expected="a file that can be read",
                remedy="Put it back, or press R and choose another one in the loader.",
            ) from error
        return cls(found.st_size, found.st_mtime_ns, found.st_ino)

    def require(self, path: Path) -> None:
        """Raise FileError if another file has taken the name ``path``, or none has it."""
        if Stamp.of(path) != self:
            raise FileError(
                f"File {path.name}",
                got="another file of that name than the one the model was opened from",
                expected="the same file, since ComfyUI needs the model once more",
                remedy="Queue again: the loader opens the new file.",
            )
