"""Which model calls calibration measures, when it does not measure all.

Calls come in patterns: steps of a run, and where memory is short the positive and the negative prompt in turn. Every
third call in a row would fall in with such a pattern and measure some of its members always and others never. The
fractional parts of multiples of the golden ratio are spread evenly over any stretch of calls, and over every second,
third, nth call of it too (Weyl's equidistribution theorem).
"""

from __future__ import annotations

import math

GOLDEN = (math.sqrt(5) - 1) / 2


def is_measured(number: int, every: int) -> bool:
    """Whether call ``number`` (from 0, which always is) belongs to the one in ``every`` (1 or more: all)."""
    return number * GOLDEN % 1.0 < 1 / every
