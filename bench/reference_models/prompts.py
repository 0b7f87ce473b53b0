"""Prompts and seeds: those a method may calibrate with, and those it is judged by. The two never overlap."""

from __future__ import annotations

import random
from dataclasses import dataclass

from reference_models.captions import random_scene

EVALUATION_SEED = 1_000_000
MOST = 256  # prompts of either kind that are kept disjoint


@dataclass(frozen=True)
class Prompt:
    """A caption and the seed of its noise."""

    caption: str
    seed: int


def evaluation_prompts(count: int) -> list[Prompt]:
    """The first ``count`` held-out prompts that methods are judged by."""
    _require(count)
    return [Prompt(caption, EVALUATION_SEED + i) for i, caption in enumerate(_captions("evaluation", count))]


def calibration_prompts(count: int, draw: int = 0) -> list[Prompt]:
    """``count`` prompts to calibrate with; ``draw`` chooses an independent set. No evaluation caption or its seed."""
    _require(count)
    judged = set(_captions("evaluation", MOST))
    captions = [c for c in _captions(f"calibration {draw}", 2 * MOST) if c not in judged]
    return [Prompt(caption, draw * MOST + i) for i, caption in enumerate(captions[:count])]


def _captions(stream: str, count: int) -> list[str]:
    rng = random.Random(stream)  # noqa: S311 - pictures, not secrets
    return [random_scene(rng).caption for _ in range(count)]


def _require(count: int) -> None:
    if not 0 < count <= MOST:
        raise ValueError(f"{count} prompts: expected 1 to {MOST}")
