"""Redraws `assets/icon.png`: bars of a histogram, two kept smooth and bright, the others snapped to steps.

python -m nox -s bench -- make/icon.py
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image, ImageDraw

if __name__ == "__main__":  # this package's parent, not the package
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from rig.pack import ROOT

PATH = ROOT / "assets" / "icon.png"
SIZE, OVERSAMPLING = 400, 4
BACKGROUND, BASE = "#14171f", "#2b3242"
KEPT, STEPS = "#ffb347", ("#2f6f9f", "#3b8dc4", "#55a9e0", "#7cc3f2")
# Height of each bar in steps; kept bars have heights between the steps.
HEIGHTS = (1, 2, 5.4, 3, 7.6, 4, 2, 1)
KEPT_FROM = 5
LEFT, BOTTOM, BAR, GAP, STEP, SEAM = 44, 334, 32, 8, 34, 5


def picture() -> Image.Image:
    """The icon at its final size, drawn larger and scaled down for smooth edges."""
    scale = OVERSAMPLING
    image = Image.new("RGBA", (SIZE * scale, SIZE * scale), (0, 0, 0, 0))
    draw = ImageDraw.Draw(image)

    def box(x: float, y: float, width: float, height: float, radius: float, colour: str) -> None:
        corners = [value * scale for value in (x, y, x + width, y + height)]
        draw.rounded_rectangle(corners, radius * scale, fill=colour)

    box(0, 0, SIZE, SIZE, 72, BACKGROUND)
    for i, height in enumerate(HEIGHTS):
        x = LEFT + i * (BAR + GAP)
        if height > KEPT_FROM:
            box(x, BOTTOM - height * STEP, BAR, height * STEP, 6, KEPT)
            continue
        for step in range(int(height)):
            box(x, BOTTOM - (step + 1) * STEP + SEAM, BAR, STEP - SEAM, 4, STEPS[step])
    box(LEFT, BOTTOM + 10, SIZE - 2 * LEFT, 8, 4, BASE)
    return image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


if __name__ == "__main__":
    PATH.parent.mkdir(exist_ok=True)
    picture().save(PATH, optimize=True)
    print(PATH.relative_to(ROOT), PATH.stat().st_size, "bytes")
