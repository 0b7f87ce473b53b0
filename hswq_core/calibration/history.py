"""How a session's statistics stood at earlier saves: what tells whether more calls would change them.

In a session's file, under ``meta["history"]``, layers in order of name::

    {"calls": int64 [P], "images": int64 [P], "sensitivity": float32 [P, L], "level": float32 [P, L]}
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..files.checks import checked
from .observer import LayerStats

# Evenly spaced in the logarithm of the calls that is one for every fifth more calls from 20 to 5000 (guess), and
# 200 KB for a model of 794 layers.
MAX_POINTS = 32
COUNTS = ("calls", "images")
KEYS = (*COUNTS, "sensitivity", "level")


@dataclass(frozen=True, eq=False)
class Point:
    """A whole session at one time.

    Attributes:
        calls, images: so far.
        sensitivity: of each layer, in order of name, float32 [L].
        level: mean |input| of each layer, float32 [L].
    """

    calls: int
    images: int
    sensitivity: torch.Tensor
    level: torch.Tensor


History = tuple[Point, ...]


def point_of(layers: Mapping[str, LayerStats], calls: int, images: int) -> Point:
    """How these statistics stand now."""
    stats = [layers[name] for name in sorted(layers)]
    return Point(calls, images, _float32([s.sensitivity for s in stats]), _float32([s.level for s in stats]))


def _float32(values: list[float]) -> torch.Tensor:
    # What float32 cannot hold must not become an infinity: a session with one is refused when it is read.
    largest = torch.finfo(torch.float32).max
    return torch.tensor(values, dtype=torch.float64).clamp(max=largest).to(torch.float32)


def joined(*histories: Iterable[Point]) -> History:
    """All points in order of calls, at most ``MAX_POINTS``.

    What is too much goes where points lie closest in the logarithm of the calls; first and last stay.
    """
    points = sorted((p for history in histories for p in history), key=lambda p: (p.calls, p.images))
    while len(points) > MAX_POINTS:
        gaps = [math.log(after.calls / before.calls) for before, after in zip(points, points[2:], strict=False)]
        points.pop(1 + gaps.index(min(gaps)))
    return tuple(points)


def to_record(history: History) -> dict[str, torch.Tensor]:
    """As it is saved."""
    return {key: _stacked([getattr(point, key) for point in history]) for key in KEYS}


def _stacked(values: list[Any]) -> torch.Tensor:
    return torch.stack(values) if isinstance(values[0], torch.Tensor) else torch.tensor(values, dtype=torch.int64)


def from_record(record: object, layers: int, calls: int) -> History:
    """The history of a session of ``layers`` layers and ``calls`` calls; None: a session without one.

    Raises:
        KeyError, ValueError: not what ``to_record`` makes.
    """
    if record is None:
        return ()
    form = {key: ((), torch.int64) if key in COUNTS else ((layers,), torch.float32) for key in KEYS}
    entries = checked(record, dict)
    found = {key: checked(entries[key], torch.Tensor) for key in KEYS}
    points = found["calls"].numel()
    shapes = {key: (points, *rest) for key, (rest, _) in form.items()}
    if not 0 < points <= MAX_POINTS or any(tuple(found[key].shape) != shapes[key] for key in KEYS):
        raise ValueError(f"a history of shapes {[tuple(t.shape) for t in found.values()]}")
    if any(found[key].dtype != dtype or found[key].layout != torch.strided for key, (_, dtype) in form.items()):
        raise ValueError("a history of other types")
    counts, images = found["calls"].tolist(), found["images"].tolist()
    if not 0 < min(counts) <= max(counts) <= calls or counts != sorted(counts) or min(images) < 0:
        raise ValueError(f"a history at {counts} calls, {images} images")
    for key in ("sensitivity", "level"):
        if not bool((found[key].isfinite() & (found[key] >= 0)).all()):
            raise ValueError(f"a history whose {key} is not finite and positive")
    return tuple(map(Point, counts, images, found["sensitivity"].unbind(), found["level"].unbind()))
