"""Chooses the layers to keep in 16 bits within a byte budget."""

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
# Overhead per layer beside its weight: entries in the header and in the plan, marker and scale.
BYTES_BESIDE_A_LAYER = 1024


@dataclass(frozen=True)
class Budget:
    """Limit on the file size.

    Attributes:
        extra_percent: size beyond that of a file with every layer in 8 bits.
        target_mb: size of the whole file, in units of 2^20 bytes; unless 0, replaces ``extra_percent``.

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
        """Extra bytes available for keeping layers in 16 bits.

        Args:
            smallest: bytes of the tensors with every layer in 8 bits.
            layers: number of layers.

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
    """Bytes of a source's tensors with every layer quantized; per-tensor scales are not counted.

    Args:
        entries: the source's tensors.
        prefix: prefix of its layers' keys.
        layers: layers to be quantized.
        scheme: layer kind -> scheme it is stored in.
    """
    return size_with(entries, {weight_key(each.name, prefix): scheme(each.kind).nbytes(each.shape) for each in layers})


def size_with(entries: Mapping[str, TensorInfo], weights: Mapping[str, int]) -> int:
    """Total bytes of the tensors, taking the sizes of keys in ``weights`` from there."""
    return sum(weights.get(key, info.nbytes) for key, info in entries.items())


def kept_bytes(shape: Sequence[int]) -> int:
    """Bytes of a layer's weight in 16 bits."""
    return 2 * math.prod(shape)


def per_byte(change: Mapping[str, float], cost: Mapping[str, int]) -> list[str]:
    """Names by descending change per byte, ties by name."""
    return sorted(change, key=lambda name: (-change[name] / cost[name], name))


def choose_kept(change: Mapping[str, float], cost: Mapping[str, int], budget: int) -> set[str]:
    """Names to keep, chosen greedily by change per byte within the budget.

    Errors of different layers hardly interact, so their squared changes of the output add up, and keeping a layer
    removes its own.

    Args:
        change: squared relative change of the model's output with only that layer in 8 bits.
        cost: extra bytes the layer takes in 16 bits, > 0.
        budget: bytes.
    """
    return fitting((name for name in per_byte(change, cost) if change[name] > 0), cost, budget)


def fitting(ranked: Iterable[str], cost: Mapping[str, int], budget: int) -> set[str]:
    """The names in ``ranked`` that fit, tried in order."""
    kept: set[str] = set()
    for name in ranked:
        if cost[name] <= budget:
            kept.add(name)
            budget -= cost[name]
    return kept
