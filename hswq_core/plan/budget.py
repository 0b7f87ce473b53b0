"""Which layers a number of bytes keeps in 16 bits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..errors import SettingError
from ..files.checkpoint import TensorInfo
from ..model.layer import Layer, weight_key
from ..quant.schemes.scheme import Scheme

DEFAULT_EXTRA_PERCENT = 3.0
MB = 2**20
# What a layer takes in a file beside its weight: its lines in the header and in the plan, marker and scale.
BYTES_BESIDE_A_LAYER = 1024


@dataclass(frozen=True)
class Budget:
    """How large a file may be.

    Attributes:
        extra_percent: beyond a file with every layer in 8 bits.
        target_mb: of the whole file, in units of 2^20 bytes; instead of ``extra_percent`` unless 0.

    Raises:
        SettingError: out of range.
    """

    extra_percent: float = DEFAULT_EXTRA_PERCENT
    target_mb: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.extra_percent <= 100.0:
            raise SettingError(
                "extra_percent", got=self.extra_percent, expected="0 to 100", remedy="3 is enough for most models."
            )
        if not 0.0 <= self.target_mb < float("inf"):
            raise SettingError("target_mb", got=self.target_mb, expected="0 or more", remedy="0: use extra_percent.")

    @property
    def text(self) -> str:
        """As it appears in file names: ``3pct``, ``6500mb``."""
        return f"{self.target_mb:g}mb" if self.target_mb else f"{self.extra_percent:g}pct"

    def extra_bytes(self, smallest: int, layers: int) -> int:
        """Bytes for layers that stay in 16 bits.

        Args:
            smallest: bytes of the tensors with every layer in 8 bits.
            layers: how many there are.

        Raises:
            SettingError: a target below ``smallest``.
        """
        if not self.target_mb:
            return int(smallest * self.extra_percent / 100)
        left = int(self.target_mb * MB) - smallest - layers * BYTES_BESIDE_A_LAYER
        if left < 0:
            raise SettingError(
                "target_mb",
                got=f"{self.target_mb:g}",
                expected=f"at least {(self.target_mb * MB - left) / MB:.0f} for this model with every layer in 8 bits",
                remedy="Choose a larger file, or 0 to use extra_percent.",
            )
        return left


def smallest_size(
    entries: Mapping[str, TensorInfo], prefix: str, layers: Iterable[Layer], scheme: Callable[[str], Scheme]
) -> int:
    """Bytes of a source's tensors with every layer quantized; one scale for a whole layer does not count.

    Args:
        entries: of the source.
        prefix: of its layers' keys.
        layers: to be quantized.
        scheme: layer kind -> what it is stored by.
    """
    return size_with(entries, {weight_key(one.name, prefix): scheme(one.kind).nbytes(one.shape) for one in layers})


def size_with(entries: Mapping[str, TensorInfo], weights: Mapping[str, int]) -> int:
    """Bytes of tensors, those of the keys in ``weights`` with the bytes given there."""
    return sum(weights.get(key, info.nbytes) for key, info in entries.items())


def kept_bytes(shape: Sequence[int]) -> int:
    """Bytes of a layer's weight that stays in 16 bits."""
    return 2 * math.prod(shape)


def per_byte(change: Mapping[str, float], cost: Mapping[str, int]) -> list[str]:
    """Names, the largest change per byte first, equal ones in order of name."""
    return sorted(change, key=lambda name: (-change[name] / cost[name], name))


def choose_kept(change: Mapping[str, float], cost: Mapping[str, int], budget: int) -> set[str]:
    """Names to keep: the largest change per byte first, as long as it fits.

    Errors of different layers hardly interact, so that squared changes of the output add up, and a kept layer
    takes its own away.

    Args:
        change: squared relative change of the model's output with that layer alone in 8 bits.
        cost: bytes more that the layer takes in 16 bits, > 0.
        budget: bytes.
    """
    return fitting((name for name in per_byte(change, cost) if change[name] > 0), cost, budget)


def fitting(ranked: Iterable[str], cost: Mapping[str, int], budget: int) -> set[str]:
    """Those of ``ranked`` that fit, each tried in its turn."""
    kept: set[str] = set()
    for name in ranked:
        if cost[name] <= budget:
            kept.add(name)
            budget -= cost[name]
    return kept
