"""How the pictures look: ComfyUI's dark colours, large letters, colours that the colour-blind can tell apart.

Only matplotlib's objects are used, no pyplot: nothing global is touched, and any thread may draw.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from ..hswq_core.plan.plan import KEEP, QUANTIZE, SKIP

SIZE, DPI = (1600, 1200), 100
# ComfyUI's canvas and node (#202020, #353535).
BACKGROUND, PANEL, TEXT, FAINT, LINE = "#202020", "#353535", "#f0f0f0", "#b4b4b4", "#5a5a5a"
# Okabe and Ito's, which differ for every kind of colour blindness, and in brightness too.
BLUE, ORANGE, GREY = "#56b4e9", "#e69f00", "#9a9a9a"
COLOURS = {QUANTIZE: BLUE, KEEP: ORANGE, SKIP: GREY}
# In points: at a node's width of 400 pixels the letters of the first are 10 pixels high.
ANSWER, HUGE, LARGE, MEDIUM, SMALL = 36, 30, 23, 20, 16
# matplotlib's bundled font has the letters up to this one; others would be boxes.
LAST_LETTER = "\u024f"
LEFT, RIGHT = 0.065, 0.98


def new_figure() -> Figure:
    """Empty, dark."""
    figure = Figure(figsize=(SIZE[0] / DPI, SIZE[1] / DPI), dpi=DPI, facecolor=BACKGROUND)
    FigureCanvasAgg(figure)
    return figure


def _canvas(figure: Figure) -> FigureCanvasAgg:
    """The canvas that ``new_figure`` gave it; matplotlib's types only say that there is one."""
    return cast(FigureCanvasAgg, figure.canvas)


def to_image(figure: Figure) -> torch.Tensor:
    """The figure, drawn: float32 [1, H, W, 3] in [0, 1]."""
    canvas = _canvas(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3].astype(np.float32) / 255
    return torch.from_numpy(pixels)[None]


def panel(figure: Figure, box: tuple[float, float, float, float], title: str) -> Axes:
    """Axes at (left, bottom, right, top), as shares of the figure, its title over it."""
    left, bottom, right, top = box
    axes = figure.add_axes((left, bottom, right - left, top - bottom), facecolor=PANEL)
    for side in axes.spines.values():
        side.set_color(LINE)
    axes.tick_params(colors=FAINT, labelsize=SMALL, length=0, which="both")
    axes.grid(axis="y", color=LINE, linewidth=1)
    axes.set_axisbelow(True)
    if title:
        say(figure, left, top + 0.012, title, MEDIUM, right=right, va="bottom")
    return axes


def say(
    figure: Figure, x: float, y: float, text: str, size: float, *, right: float = RIGHT, colour: str = TEXT, **more: Any
) -> float:
    """Write one line from ``x``, shortened in the middle if it would pass ``right``; returns where it ends."""
    written = figure.text(x, y, printable(text), size=size, color=colour, parse_math=False, **more)
    whole, end = written.get_text(), ends(figure, written)
    letters = len(whole)
    while end > right and letters > 8:
        letters = min(letters - 1, int(letters * (right - x) / (end - x)))
        written.set_text(shortened(whole, letters))
        end = ends(figure, written)
    return end


def ends(figure: Figure, text: Text) -> float:
    """Right end of a text, as a share of the figure."""
    return float(text.get_window_extent(_canvas(figure).get_renderer()).x1 / SIZE[0])


def printable(text: str) -> str:
    """Without line breaks, and with ? for letters that the font lacks."""
    text = " ".join(text.split())
    return "".join(letter if letter.isprintable() and letter <= LAST_LETTER else "?" for letter in text)


def shortened(text: str, letters: int) -> str:
    """At most ``letters`` letters, the middle left out: a file's name ends with what matters."""
    if len(text) <= letters:
        return text
    head = (letters - 3) // 2
    return f"{text[:head]}...{text[len(text) - (letters - 3 - head) :]}"


def paragraph(figure: Figure, y: float, text: str, size: float, step: float, *, colour: str = TEXT) -> float:
    """Write at most three full-width lines, downward from ``y``; returns where the next would be."""
    words, lines = printable(text).split(" "), [""]
    probe = figure.text(LEFT, y, "", size=size, parse_math=False)
    for word in words:
        longer = f"{lines[-1]} {word}".strip()
        probe.set_text(longer)
        if lines[-1] and ends(figure, probe) > RIGHT:
            lines.append(word)
        else:
            lines[-1] = longer
    probe.remove()
    for line in lines[:3]:
        say(figure, LEFT, y, line, size, colour=colour, va="top")
        y -= step
    return y
