"""Scenes drawn as pictures, and the fixed linear code between pictures and 16-channel latents.

No VAE: the latent consists of the twelve channels of a pixel-unshuffled RGB picture and four of its unshuffled edges,
so a picture of 2N x 2N pixels has a latent of N x N and is restored from it without loss.
"""

from __future__ import annotations

import math
import random

import torch
from PIL import Image
from torch.nn import functional

from reference_models.captions import COLOURS, COLUMNS, ROWS, SHAPES, SIZES, Scene, Thing

CHANNELS = 16
# ComfyUI's latent format for Flux and Z-Image: model = (latent - shift) · scale.
SCALE, SHIFT = 0.3611, 0.1159
EDGE_GAIN = 4.0
JITTER = 0.08


def draw(scenes: list[Scene], size: int, rng: random.Random | None = None) -> torch.Tensor:
    """Pictures [n, 3, size, size] in 0..1; ``rng`` shifts and scales each thing a little."""
    axis = (torch.arange(size) + 0.5) / size * 2 - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([_scene(scene, x, y, rng) for scene in scenes])


def to_latents(pictures: torch.Tensor) -> torch.Tensor:
    """[n, 3, 2h, 2w] in 0..1 -> [n, 16, h, w], as from a VAE's encoder."""
    signed = pictures * 2 - 1
    channels = [functional.pixel_unshuffle(signed, 2), functional.pixel_unshuffle(_edges(pictures), 2)]
    return torch.cat(channels, 1) / SCALE + SHIFT


def to_pictures(latents: torch.Tensor) -> torch.Tensor:
    """[n, 16, h, w] -> [n, 3, 2h, 2w] in 0..1; the edges are dropped."""
    signed = functional.pixel_shuffle((latents[:, :12] - SHIFT) * SCALE, 2)
    return ((signed + 1) / 2).clamp(0, 1)


def as_image(picture: torch.Tensor, times: int) -> Image.Image:
    """[3, h, w] in 0..1 as an image enlarged ``times`` times, so that pixels can be seen."""
    image = Image.fromarray((picture.permute(1, 2, 0) * 255).round().byte().numpy())
    return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)


def _edges(pictures: torch.Tensor) -> torch.Tensor:
    """Gradient magnitude of the brightness, [n, 1, h, w], in about the pictures' own range."""
    grey = functional.pad(pictures.mean(1, keepdim=True), (0, 1, 0, 1), mode="replicate")
    dx, dy = grey[..., :-1, 1:] - grey[..., :-1, :-1], grey[..., 1:, :-1] - grey[..., :-1, :-1]
    return EDGE_GAIN * (dx.square() + dy.square()).sqrt() - 1


def _scene(scene: Scene, x: torch.Tensor, y: torch.Tensor, rng: random.Random | None) -> torch.Tensor:
    picture = _ground(scene, x, y)
    for thing in scene.things:
        colour = torch.tensor(COLOURS[thing.colour])[:, None, None]
        inside = _coverage(thing, x, y, rng)
        picture = picture * (1 - inside) + colour * inside
    return picture


def _ground(scene: Scene, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    first, second = (torch.tensor(COLOURS[name])[:, None, None] for name in scene.colours)
    share = {"plain": torch.zeros_like(x), "vertical": (y + 1) / 2, "horizontal": (x + 1) / 2}[scene.background]
    return first * (1 - share) + second * share


def _coverage(thing: Thing, x: torch.Tensor, y: torch.Tensor, rng: random.Random | None) -> torch.Tensor:
    """0 outside, 1 inside, with a one-pixel ramp between."""

    def moved() -> float:
        return rng.uniform(-JITTER, JITTER) if rng else 0.0

    radius = SIZES[thing.size] * (1 + moved())
    x, y = x - COLUMNS[thing.column] - moved(), y - ROWS[thing.row] - moved()
    pixel = 2 / x.shape[0]
    return (0.5 - _distance(thing.shape, x, y, radius) / pixel).clamp(0, 1)


def _distance(shape: str, x: torch.Tensor, y: torch.Tensor, radius: float) -> torch.Tensor:
    """Approximate signed distance to the outline, negative inside."""
    outlines = {
        "circle": lambda: torch.hypot(x, y) - radius,
        "square": lambda: torch.maximum(x.abs(), y.abs()) - 0.85 * radius,
        "triangle": lambda: torch.maximum(y - 0.7 * radius, (x.abs() * math.sqrt(3) - y) / 2 - 0.55 * radius),
        "ring": lambda: (torch.hypot(x, y) - 0.75 * radius).abs() - 0.25 * radius,
        "cross": lambda: _cross(x.abs(), y.abs(), radius),
        "diamond": lambda: (x.abs() + y.abs() - 1.1 * radius) / math.sqrt(2),
    }
    if set(outlines) != set(SHAPES):
        raise AssertionError(f"outlines for {sorted(outlines)}, shapes are {sorted(SHAPES)}")
    return outlines[shape]()


def _cross(x: torch.Tensor, y: torch.Tensor, radius: float) -> torch.Tensor:
    bar = 0.32 * radius
    across = torch.maximum(x - radius, y - bar)
    return torch.minimum(across, torch.maximum(y - radius, x - bar))
