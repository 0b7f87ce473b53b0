"""A picture beside its reference: composed with the difference in colours, and alternating with it."""

from __future__ import annotations

import math

import torch
from PIL import Image, ImageDraw, ImageFont

from .compare import seen

# Every sixteenth colour of matplotlib's "inferno": brightness grows evenly from black to pale yellow, so that it reads
# on a dark page and without red or green.
INFERNO = (
    *(0x000004, 0x0B0724, 0x210C4A, 0x3C0965, 0x57106D, 0x70196E, 0x89226A, 0xA32B61, 0xBB3755),
    *(0xD14644, 0xE35932, 0xF1711E, 0xF98D0A, 0xFCAB0F, 0xF9CA32, 0xF2E865, 0xFCFFA4),
)
GROUND, INK = (0x1A, 0x1A, 0x1A), (0xF0, 0xF0, 0xF0)  # guess: readable, and dark like the page
GAP = 8
LEAST_WIDTH, MOST_HEIGHT = 256, 1024  # guess: a narrower panel is enlarged, but not beyond that height
LEAST_TEXT, TEXT_SHARE = 14, 40  # pixels; a share of the whole width


def flicker(reference: torch.Tensor, candidate: torch.Tensor) -> torch.Tensor:
    """IMAGE [2B, H, W, C]: reference 1, candidate 1, reference 2, candidate 2 ...; the pictures unchanged."""
    pairs = torch.stack([reference, candidate.to(reference)], 1)
    return pairs.flatten(0, 1)


def heat_map(reference: torch.Tensor, candidate: torch.Tensor, amplify: float) -> torch.Tensor:
    """Colours [H, W, 3] of the largest difference of any channel, ``amplify`` times, clamped to 1.

    Args:
        reference: float [H, W, C].
        candidate: the same shape.
        amplify: a difference of 1 / amplify of the range or more gets the brightest colour.
    """
    heat = (seen(candidate) - seen(reference)).abs().amax(-1).mul(amplify).clamp(max=1.0)
    table = torch.tensor([_rgb(colour) for colour in INFERNO], device=heat.device)
    place = heat * (len(INFERNO) - 1)
    below = place.floor().long().clamp(max=len(INFERNO) - 2)
    return torch.lerp(table[below], table[below + 1], (place - below)[..., None])


def side_by_side(reference: torch.Tensor, candidate: torch.Tensor, amplify: float, caption: str) -> torch.Tensor:
    """IMAGE [1, H', W', 3]: a strip with the caption over reference | candidate | heat map.

    Small pictures are enlarged by whole numbers, pixel by pixel. Alpha is not drawn.

    Args:
        reference: float [H, W, C], C 3 or 4.
        candidate: the same shape.
        amplify: of the heat map.
        caption: one line.
    """
    reference, candidate = reference.cpu(), candidate.cpu()
    heat = heat_map(reference, candidate, amplify)
    panels = [_enlarged(picture) for picture in (seen(reference)[..., :3], seen(candidate)[..., :3], heat)]
    width = panels[0].shape[1]
    strip = _strip(width, ["reference", "candidate", f"difference, {amplify:g} times"], caption)
    ground = torch.tensor(GROUND) / 255
    body = ground.expand(panels[0].shape[0], strip.shape[1], 3).clone()
    for column, panel in enumerate(panels):
        left = column * (width + GAP)
        body[:, left : left + width] = panel
    return torch.cat([strip, body])[None]


def _rgb(colour: int) -> tuple[float, ...]:
    return tuple((colour >> shift & 255) / 255 for shift in (16, 8, 0))


def _enlarged(picture: torch.Tensor) -> torch.Tensor:
    height, width, _ = picture.shape
    times = max(1, min(math.ceil(LEAST_WIDTH / width), MOST_HEIGHT // height))
    return picture.repeat_interleave(times, 0).repeat_interleave(times, 1)


def _strip(panel: int, labels: list[str], caption: str) -> torch.Tensor:
    """[height, width, 3] with the caption, and below it a label over each panel; as wide as the longest text needs."""
    whole = 3 * panel + 2 * GAP
    size = max(LEAST_TEXT, whole // TEXT_SHARE)
    large, small = ImageFont.load_default(size), ImageFont.load_default(max(LEAST_TEXT, round(size * 0.8)))
    lefts = [column * (panel + GAP) + size // 2 for column in range(len(labels))]
    ends = [left + small.getlength(label) for left, label in zip(lefts, labels, strict=True)]
    width = max(whole, math.ceil(max(*ends, large.getlength(caption) + size // 2) + size // 2))
    image = Image.new("RGB", (width, 3 * size), GROUND)
    pen = ImageDraw.Draw(image)
    pen.text((size // 2, size * 0.85), caption, INK, large, anchor="lm")
    for left, label in zip(lefts, labels, strict=True):
        pen.text((left, size * 2.2), label, INK, small, anchor="lm")
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.reshape(image.height, image.width, 3).float() / 255
