"""How quantized layers are written: a format and its options."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..errors import SettingError
from ..quant.schemes.scheme import GRANULARITIES, TENSOR, Scheme
from .formats import FORMATS, FileFormat

# More than the loss with every layer in 8 bits.
MOST_LOSS_DB = 100.0


@dataclass(frozen=True)
class Encoding:
    """A format with its options.

    Attributes:
        file_format: a row of the formats table.
        granularity: "tensor" or "channel": what one scale covers.
        fast_matmul: let loaders multiply in 8 bits in as many layers as this loss of the model's output allows, dB;
            0: in none.

    Raises:
        SettingError: an option the format does not support.
    """

    file_format: FileFormat
    granularity: str = TENSOR
    fast_matmul: float = 0.0

    def __post_init__(self) -> None:
        if self.granularity not in GRANULARITIES:
            raise SettingError(
                "scale_per", got=repr(self.granularity), expected=" or ".join(GRANULARITIES), remedy="Choose one."
            )
        if not _has_scales(self.file_format, self.granularity):
            raise self._lacking("scale_per", self.granularity, lambda row: _has_scales(row, self.granularity))
        if not 0.0 <= self.fast_matmul <= MOST_LOSS_DB:
            raise SettingError(
                "fast_matmul",
                got=self.fast_matmul,
                expected=f"0 to {MOST_LOSS_DB:g} dB",
                remedy="0: off; 3 is careful.",
            )
        if self.fast_matmul and not self.file_format.fast_matmul:
            raise self._lacking("fast_matmul", f"{self.fast_matmul:g} dB", lambda row: row.fast_matmul)

    def _lacking(self, option: str, value: str, able: Callable[[FileFormat], bool]) -> SettingError:
        formats = " or ".join(row.name for row in FORMATS.values() if able(row))
        return SettingError(
            option,
            got=f"{value} with format {self.file_format.name}",
            expected=f"format {formats}",
            remedy=f"Choose that format, or leave {option} at its default.",
        )

    def scheme(self, kind: str) -> Scheme:
        """The scheme for quantized layers of ``kind``."""
        return self.file_format.scheme(kind, self.granularity) or self.file_format.usual(kind)

    def usual(self, kind: str) -> Scheme:
        """The scheme without options: what other tools would write."""
        return self.file_format.usual(kind)

    @property
    def text(self) -> str:
        """Everything rounding depends on, in one line."""
        return " ".join(f"{kind}:{self.scheme(kind).name}" for kind in sorted(self.file_format.schemes))


def _has_scales(row: FileFormat, granularity: str) -> bool:
    """Whether any layer can have scales of this granularity; formats without scales count as "tensor"."""
    rows = [row.scheme(kind, granularity) for kind in row.schemes]
    return granularity == TENSOR or any(scheme is not None and scheme.scaled for scheme in rows)
