"""Which layers a number of bytes keeps in 16 bits."""

from __future__ import annotations

from collections.abc import Mapping

from .errors import SettingError

DEFAULT_EXTRA_PERCENT = 3.0


def check_extra_percent(extra: float) -> float:
    """``extra`` if 0 ≤ extra ≤ 100, else SettingError."""
    if not 0.0 <= extra <= 100.0:
        raise SettingError("extra_percent", got=extra, expected="0 to 100", remedy="3 is enough for most models.")
    return extra


def choose_kept(change: Mapping[str, float], cost: Mapping[str, int], budget: int) -> set[str]:
    """Names to keep: the largest change per byte first, as long as it fits.

    Errors of different layers hardly interact, so that squared changes of the output add up, and a kept layer
    takes its own away.

    Args:
        change: squared relative change of the model's output with that layer alone in 8 bits.
        cost: bytes more that the layer takes in 16 bits, > 0.
        budget: bytes.
    """
    kept: set[str] = set()
    for name in sorted(change, key=lambda name: (-change[name] / cost[name], name)):
        if cost[name] <= budget and change[name] > 0:
            kept.add(name)
            budget -= cost[name]
    return kept
