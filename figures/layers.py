"""Strips with a mark for each layer, in model order."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from ..hswq_core.reports.table import Row
from .theme import COLOURS, FAINT, LINE, SMALL, ends, printable

Values = Sequence[float | None]
# Share of the height for the band that shows every layer's colour, even of those without a value.
BAND = 0.04
# dB: a smaller range is not worth seeing.
LEAST_SPAN = 4.0


def bars(axes: Axes, rows: Sequence[Row], values: Values, *, log: bool) -> None:
    """A bar per layer, coloured by what is done with it."""
    known = [value for value in values if value is not None and (value > 0 or not log)]
    low = min(known, default=1.0) / 3 if log else 0.0
    # With hundreds of layers, gaps would be all one sees.
    width = 0.85 if len(rows) <= 200 else 1.0
    for action, colour in COLOURS.items():
        at = [i for i, row in enumerate(rows) if row.action == action and (values[i] or 0.0) > low]
        boxes = [_box(i, width, low, values[i] or low) for i in at]
        axes.add_collection(PolyCollection(boxes, facecolor=colour, linewidth=0), autolim=False)
    _limits(axes, len(rows))
    if log:
        axes.set_yscale("log")
        axes.set_ylim(low, max(known, default=3.0) * 2)
        axes.yaxis.set_major_locator(LogLocator(numticks=6))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(0, max([*known, 1e-6]) * 1.08)
        axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))


def _box(number: int, width: float, low: float, high: float) -> list[tuple[float, float]]:
    left, right = number - width / 2, number + width / 2
    return [(left, low), (left, high), (right, high), (right, low)]


def points(axes: Axes, rows: Sequence[Row], values: Values) -> None:
    """A point for each layer that has a value."""
    for action, colour in COLOURS.items():
        pairs = zip(rows, values, strict=True)
        shown = {i: value for i, (row, value) in enumerate(pairs) if row.action == action and value is not None}
        axes.plot(list(shown), list(shown.values()), "o", color=colour, markersize=7 if len(rows) <= 200 else 4)
    _limits(axes, len(rows))
    known = [value for value in values if value is not None]
    low, high = min(known), max(known)
    rest = max(LEAST_SPAN - (high - low), 0.2 * (high - low)) / 2
    axes.set_ylim(low - rest, high + rest)
    axes.yaxis.set_major_locator(MaxNLocator(4))


def _limits(axes: Axes, layers: int) -> None:
    axes.set_xlim(-0.7, layers - 0.3)
    axes.set_xticks([])


def band(axes: Axes, rows: Sequence[Row]) -> None:
    """Every layer's colour, below the axes."""
    least = len(rows) / 400  # else a kept layer among hundreds is thinner than a pixel of the node
    for action, colour in COLOURS.items():
        spans = [(i - 0.5, max(1, least)) for i, row in enumerate(rows) if row.action == action]
        axes.broken_barh(
            spans, (-BAND - 0.015, BAND), facecolor=colour, transform=axes.get_xaxis_transform(), clip_on=False
        )


def sections(figure: Figure, axes: Axes, rows: Sequence[Row]) -> None:
    """Names of the model's parts under the band, where there is room for them."""
    names = parts([row.name for row in rows])
    begin = 0
    for end in range(1, len(names) + 1):
        if end < len(names) and names[end] == names[begin]:
            continue
        if begin:
            axes.axvline(begin - 0.5, color=LINE, linewidth=1, zorder=0.5)
        _label(figure, axes, names[begin], begin - 0.5, end - 0.5)
        begin = end


def _label(figure: Figure, axes: Axes, name: str, left: float, right: float) -> None:
    below = axes.get_xaxis_transform()
    text = axes.text(
        left, -BAND - 0.05, printable(name), size=SMALL, color=FAINT, transform=below, va="top", clip_on=False
    )
    text.set_parse_math(False)
    edges = axes.transData.transform([(left, 1), (right, 1)])[:, 0] / figure.bbox.width
    if ends(figure, text) > edges[1]:
        text.remove()


def parts(names: Sequence[str]) -> list[str]:
    """For each layer, the first part of its name that is not the same for all."""
    split = [name.split(".") for name in names]
    depth = 0
    while len({tuple(words[: depth + 1]) for words in split}) == 1 and min(map(len, split), default=0) > depth + 1:
        depth += 1
    return [words[depth] for words in split]


def short_number(value: float) -> str:
    """A number, short enough for an axis."""
    if value and not 1e-3 <= abs(value) < 1e4:
        return f"1e{round(math.log10(abs(value)))}" if math.log10(abs(value)).is_integer() else f"{value:.0e}"
    return f"{value:g}"
