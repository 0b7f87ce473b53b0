"""How a method writes its quantized layers: format, grid, and the options of the format that are on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..errors import SettingError
from ..quant.grid import FLOAT8_E4M3FN, Grid, largest, largest_of_channels
from .formats import CHANNEL, FORMATS, GRANULARITIES, TENSOR, FileFormat

# More than every layer at once costs.
MOST_LOSS_DB = 100.0


@dataclass(frozen=True)
class Encoding:
    """A format with its options.

    Attributes:
        file_format: a row of the formats table.
        grid: of the codes.
        granularity: "tensor" or "channel": what one scale serves.
        fast_matmul: let loaders multiply in 8 bits in as many layers as this loss of the model's output allows, dB;
            0: in none.

    Raises:
        SettingError: an option that the format has not.
    """

    file_format: FileFormat
    grid: Grid = FLOAT8_E4M3FN
    granularity: str = TENSOR
    fast_matmul: float = 0.0

    def __post_init__(self) -> None:
        if self.granularity not in GRANULARITIES:
            raise SettingError(
                "scale_per", got=repr(self.granularity), expected=" or ".join(GRANULARITIES), remedy="Choose one."
            )
        if self.granularity not in self.file_format.granularities:
            raise self._lacking("scale_per", self.granularity, lambda row: self.granularity in row.granularities)
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

    @property
    def text(self) -> str:
        """What rounding depends on, one line."""
        return f"{','.join(sorted(self.file_format.scaled_kinds))} {self.grid.name} {self.granularity}"

    def scaled(self, kind: str) -> bool:
        """Whether a quantized layer of ``kind`` has a scale."""
        return self.file_format.scaled(kind)

    def scale(self, w: torch.Tensor, kind: str) -> torch.Tensor | None:
        """float32 multiplier at dequantize of a weight [out, ...]: [], or [out, 1, ...] for a scale a channel.

        On the weight's device; None where the layer has none.
        """
        if not self.scaled(kind):
            return None
        amax = largest_of_channels(w) if self.granularity == CHANNEL else largest(w)
        return self.grid.scale(amax).to(w.device)
