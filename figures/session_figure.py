"""The picture of a session."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from ..hswq_core.methods.hswq import DEFAULT_KEEP_RATIO
from ..hswq_core.plan.plan import KEEP, QUANTIZE, SKIP
from ..hswq_core.reports.convergence import ENOUGH, ENOUGH_LEVEL, MORE, UNKNOWN, Distance, allowed_changes
from ..hswq_core.reports.session import SessionReport
from .layers import band, bars, sections, short_number
from .theme import (
    ANSWER,
    BLUE,
    COLOURS,
    FAINT,
    HUGE,
    LARGE,
    LEFT,
    MEDIUM,
    ORANGE,
    RIGHT,
    SMALL,
    new_figure,
    panel,
    paragraph,
    say,
)

WORDS = {KEEP: "kept", QUANTIZE: "in 8 bits", SKIP: "never"}
ANSWERS = {ENOUGH: "enough", MORE: "not yet", UNKNOWN: "too few points"}
MIDDLE = 0.53


def figure_of(report: SessionReport) -> Figure:
    """The whole picture."""
    figure = new_figure()
    say(figure, LEFT, 0.972, report.name, HUGE, va="top", weight="bold")
    say(figure, LEFT, 0.915, f"{report.facts[0]}, {report.facts[-2]}", LARGE, va="top", colour=FAINT)
    verdicts = [("hswq", report.statistics), *([("model_aware", report.calls)] if report.calls else [])]
    x, y = LEFT, 0.803
    for method, verdict in verdicts:
        colour = BLUE if verdict.answer == ENOUGH else ORANGE
        x = 0.025 + say(figure, x, 0.872, f"{method}: {ANSWERS[verdict.answer]}", ANSWER, va="top", colour=colour)
        y = paragraph(figure, y, f"{method}: {verdict.text}", MEDIUM, 0.032)
    _layers(figure, report)
    _curve(figure, (MIDDLE + LEFT, 0.085, RIGHT, 0.335), report.distances)
    return figure


def _layers(figure: Figure, report: SessionReport) -> None:
    rows = report.rows
    top = panel(figure, (LEFT, 0.455, RIGHT, 0.655), "")
    bars(top, rows, [row.measure for row in rows], log=True)
    band(top, rows)
    sections(figure, top, rows)
    x = 0.02 + say(figure, LEFT, 0.667, f"Sensitivity; hswq at {DEFAULT_KEEP_RATIO:g}:", MEDIUM)
    for action, words in WORDS.items():
        count = sum(row.action == action for row in rows)
        if count:
            x = 0.02 + say(figure, x, 0.667, f"{count} {words}", MEDIUM, colour=COLOURS[action])
    lower = panel(figure, (LEFT, 0.085, MIDDLE - 0.04, 0.335), "Mean size of the inputs")
    bars(lower, rows, [row.level for row in rows], log=True)


def _curve(figure: Figure, box: tuple[float, float, float, float], distances: tuple[Distance, ...]) -> None:
    """How far earlier saves were from now, in per cent; the limits are what a doubling may change."""
    axes = panel(figure, box, "Difference from now, %, by calls")
    earlier, kept = distances[:-1], max(1, distances[-1].kept)
    if not earlier:
        axes.set(xticks=[], yticks=[])
        axes.text(0.5, 0.5, "one point so far", transform=axes.transAxes, color=FAINT, size=LARGE, ha="center")
        return
    calls = [d.calls for d in earlier]
    lines = (
        ("kept layers", [100 * (1 - d.common) for d in earlier], ORANGE, "s", 100 * allowed_changes(kept) / kept),
        ("levels", [100 * d.level for d in earlier], BLUE, "o", 100 * ENOUGH_LEVEL),
    )
    x = box[0]
    for words, values, colour, mark, limit in lines:
        axes.plot(calls, values, f"{mark}-", color=colour, linewidth=3, markersize=9, clip_on=False)
        axes.axhline(limit, color=colour, linewidth=2, linestyle=":")
        x = 0.015 + say(figure, x, 0.022, words, MEDIUM, colour=colour)
    say(figure, x, 0.022, "dotted: enough", SMALL, colour=FAINT)
    axes.set_xscale("log")
    axes.set_xlim(calls[0] / 1.1, distances[-1].calls * 1.1)
    axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(0, 120)
    axes.set_yticks([0, 1, 10, 100])
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
        axis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
