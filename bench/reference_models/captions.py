"""Scenes, their captions, and the text encoder of the reference models.

A caption is read word by word into fixed slots: five for each of two objects, three for the background. A
token is the word's vector plus the slot's, so that a colour is bound to its shape as in a real encoder.
All vectors come from one frozen random stream: the same caption gives the same conditioning everywhere.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

COLOURS = {
    "red": (0.90, 0.12, 0.14),
    "green": (0.10, 0.65, 0.22),
    "blue": (0.12, 0.25, 0.90),
    "yellow": (0.98, 0.85, 0.15),
    "purple": (0.55, 0.15, 0.70),
    "cyan": (0.20, 0.85, 0.90),
    "orange": (0.98, 0.55, 0.10),
    "white": (0.97, 0.97, 0.97),
    "black": (0.05, 0.05, 0.06),
}
SHAPES = ("circle", "square", "triangle", "ring", "cross", "diamond")
SIZES = {"small": 0.26, "large": 0.46}
ROWS = {"top": -0.5, "middle": 0.0, "bottom": 0.5}
COLUMNS = {"left": -0.5, "center": 0.0, "right": 0.5}
BACKGROUNDS = ("plain", "vertical", "horizontal")
WORDS = (*SIZES, *COLOURS, *SHAPES, *ROWS, *COLUMNS, *BACKGROUNDS)
SILENT = {"a", "to"}
# The slot for the word that follows each of these.
SLOT_AFTER = {"and": 5, "on": 10}
TOKENS, WIDTH = 16, 128
_STREAM = 20261121


class CaptionError(ValueError):
    """A caption with words the reference models never learned."""


@dataclass(frozen=True)
class Thing:
    """One object, described by keys of the tables above."""

    size: str
    colour: str
    shape: str
    row: str
    column: str


@dataclass(frozen=True)
class Scene:
    """The content of a picture: one or two things on a background of one or two colours."""

    things: tuple[Thing, ...]
    background: str
    colours: tuple[str, str]

    @property
    def caption(self) -> str:
        """For example "a large red circle top left on vertical blue to green"."""
        things = [f"a {t.size} {t.colour} {t.shape} {t.row} {t.column}" for t in self.things]
        first, second = self.colours
        ground = f"plain {first}" if self.background == "plain" else f"{self.background} {first} to {second}"
        return f"{' and '.join(things)} on {ground}"


def random_scene(rng: random.Random) -> Scene:
    """One or two things at different places, none in a background colour."""
    first, second, *others = rng.sample(sorted(COLOURS), 6)
    background = rng.choice(BACKGROUNDS)
    places = rng.sample([(row, column) for row in ROWS for column in COLUMNS], 2)
    things = [
        Thing(rng.choice(sorted(SIZES)), colour, rng.choice(SHAPES), row, column)
        for colour, (row, column) in zip(others, places, strict=False)
    ]
    return Scene(tuple(things[: rng.choice((1, 2, 2))]), background, (first, second))


def embed(captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Conditioning for captions; "" gives the unconditional one, all zeros.

    Returns:
        tokens [n, 16, 128] and pooled [n, 128], float32, both with about unit variance where there are words.

    Raises:
        CaptionError: an unknown word, or too many of them.
    """
    words, slots = _vectors()
    tokens = torch.zeros(len(captions), TOKENS, WIDTH)
    pooled = torch.zeros(len(captions), WIDTH)
    for i, caption in enumerate(captions):
        placed = _slots(caption)
        for slot, word in placed.items():
            tokens[i, slot] = (words[word] + slots[slot]) / 2**0.5
            pooled[i] += words[word] * slots[slot].sign() / len(placed) ** 0.5
    return tokens, pooled


def _slots(caption: str) -> dict[int, int]:
    """{slot: index of the word in it}."""
    placed, slot = {}, 0
    for word in caption.split():
        if word in SILENT:
            continue
        if word in SLOT_AFTER:
            slot = SLOT_AFTER[word]
        elif word in WORDS and slot < TOKENS:
            placed[slot] = WORDS.index(word)
            slot += 1
        else:
            known = " ".join((*WORDS, *sorted(SILENT), *SLOT_AFTER))
            raise CaptionError(f"caption {caption!r}, word {word!r}: expected at most {TOKENS} words of: {known}")
    return placed


@cache
def _vectors() -> tuple[torch.Tensor, torch.Tensor]:
    stream = np.random.RandomState(_STREAM)  # frozen by numpy's policy, unlike torch's generators'
    words = torch.from_numpy(stream.standard_normal((len(WORDS), WIDTH))).float()
    slots = torch.from_numpy(stream.standard_normal((TOKENS, WIDTH))).float()
    return words, slots
