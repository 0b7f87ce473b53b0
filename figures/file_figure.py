"""The picture of a quantized file."""

from __future__ import annotations

from collections import Counter

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ..hswq_core.plan.plan import KEEP, QUANTIZE, SKIP
from ..hswq_core.reports.file import CHANGE, Curve, FileReport
from ..hswq_core.reports.table import megabytes
from .layers import Values, band, bars, points, sections, short_number
from .theme import BLUE, COLOURS, FAINT, HUGE, LARGE, LEFT, MEDIUM, ORANGE, RIGHT, SMALL, TEXT, new_figure, panel, say

WORDS = {QUANTIZE: "in 8 bits", KEEP: "kept in 16", SKIP: "skipped"}
MIDDLE = 0.53
TOP_STRIP = (LEFT, 0.515, RIGHT, 0.765)
LOWER = (0.075, 0.385)


def figure_of(report: FileReport) -> Figure:
    """The whole picture."""
    figure = new_figure()
    _head(figure, report)
    strips = _strips(report)
    _strip(figure, report, TOP_STRIP, *strips[0], named=True)
    bottom, top = LOWER
    height = (top - bottom + 0.065) / max(1, len(strips) - 1)
    for i, strip in enumerate(strips[1:]):
        upper = top - i * height
        _strip(figure, report, (LEFT, upper - height + 0.065, MIDDLE - 0.04, upper), *strip)
    left = MIDDLE + LEFT if len(strips) > 1 else LEFT + 0.1
    if report.curve is not None and len(report.curve.points) > 1:
        _curve(figure, (left, bottom, RIGHT, top), report.curve)
    else:
        _bytes(figure, (left + 0.07, bottom, RIGHT, top), report)
    return figure


def _head(figure: Figure, report: FileReport) -> None:
    say(figure, LEFT, 0.972, report.name, HUGE, va="top", weight="bold")
    say(figure, LEFT, 0.915, report.facts[0], LARGE, va="top", colour=FAINT)
    counts, x = Counter(row.action for row in report.rows), LEFT
    for action, words in WORDS.items():
        if counts[action]:
            x = 0.025 + say(figure, x, 0.868, f"{counts[action]} {words}", HUGE, va="top", colour=COLOURS[action])
    size = f"{megabytes(report.nbytes)}, {report.extra:+.1%} extra"
    say(figure, x, 0.868, size, HUGE, va="top")


def _strips(report: FileReport) -> list[tuple[str, Values, str]]:
    """(title, values, how they are drawn) of everything known, most telling first."""
    rows = report.rows
    measure = (
        f"Each layer in 8 bits: {report.measure}" if report.measure == CHANGE else f"Each layer's {report.measure}"
    )
    strips: list[tuple[str, Values, str]] = [
        (measure, [row.measure for row in rows], "log"),
        ("Weight SQNR, dB", [row.sqnr_db for row in rows], "points"),
        ("MB of each layer", [row.nbytes / 2**20 for row in rows], "bars"),
    ]
    return [strip for strip in strips if any(value is not None for value in strip[1])]


def _strip(
    figure: Figure,
    report: FileReport,
    box: tuple[float, float, float, float],
    title: str,
    values: Values,
    how: str,
    *,
    named: bool = False,
) -> None:
    axes = panel(figure, box, title)
    if how == "points":
        points(axes, report.rows, values)
    else:
        bars(axes, report.rows, values, log=how == "log")
    if named:
        band(axes, report.rows)
        sections(figure, axes, report.rows)


def _curve(figure: Figure, box: tuple[float, float, float, float], curve: Curve) -> None:
    """Size and quality; the axis ends soon after the file's own size, since nobody looks beyond."""
    axes = panel(figure, box, "Model output, dB, by extra bytes, %")
    shares = [100 * extra / max(curve.smallest, 1) for extra, _ in curve.points]
    end = shares[-1]
    if curve.chosen is not None:
        end = min(end, max(4 * 100 * curve.chosen[0] / max(curve.smallest, 1), shares[1] * 2))
    shown = [(x, db) for x, (_, db) in zip(shares, curve.points, strict=True) if x <= end]
    axes.plot([x for x, _ in shown], [db for _, db in shown], color=BLUE, linewidth=3)
    if curve.chosen is not None:
        x, db = 100 * curve.chosen[0] / max(curve.smallest, 1), curve.chosen[1]
        axes.plot([x], [db], "o", color=ORANGE, markersize=18, markeredgecolor=TEXT, markeredgewidth=2, zorder=5)
        # The curve rises: that corner is empty.
        words, corner = f"this file: {db:.1f} dB", axes.transAxes
        axes.text(0.97, 0.05, words, color=ORANGE, transform=corner, ha="right", va="bottom", size=LARGE)
    axes.margins(x=0.06, y=0.16)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"+{short_number(value)}"))


def _bytes(figure: Figure, box: tuple[float, float, float, float], report: FileReport) -> None:
    """Where the bytes are, for files in which no change of the model's output was measured."""
    axes = panel(figure, box, "Where the bytes are, MB")
    sizes = {words: sum(r.nbytes for r in report.rows if r.action == action) for action, words in WORDS.items()}
    sizes["other tensors"] = report.nbytes - sum(sizes.values())
    shown = [(words, size) for words, size in sizes.items() if size]
    colours = {words: COLOURS[action] for action, words in WORDS.items()}
    largest = max(size for _, size in shown)
    for i, (words, size) in enumerate(shown):
        axes.barh(i, size / 2**20, 0.6, color=colours.get(words, TEXT))
        axes.text((size + largest * 0.02) / 2**20, i, f"{size / 2**20:,.1f}", color=TEXT, size=MEDIUM, va="center")
    axes.set_yticks(range(len(shown)), [words for words, _ in shown])
    axes.tick_params(axis="y", labelsize=MEDIUM)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlim(0, largest * 1.3 / 2**20)
    axes.set_xticks([])
    axes.grid(visible=False)
    say(figure, LEFT, 0.022, report.facts[-1], SMALL, colour=FAINT)
