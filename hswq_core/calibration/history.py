"""A session's statistics at earlier saves, used to judge whether more calls would still change them.

Stored in the session file under ``meta["history"]``, layers sorted by name::

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

# Spaced evenly in log(calls), that is one point per 20 % more calls from 20 to 5000 (guess), and 200 KB for a model of
# 794 layers.
MAX_POINTS = 32
COUNTS = ("calls", "images")
KEYS = (*COUNTS, "sensitivity", "level")


@dataclass(frozen=True, eq=False)
class Point:
    """Snapshot of a whole session.

    Attributes:
        calls, images: counts so far.
        sensitivity: of each layer, sorted by name, float32 [L].
        level: mean |input| of each layer, float32 [L].
    """

    calls: int
    images: int
    sensitivity: torch.Tensor
    level: torch.Tensor


History = tuple[Point, ...]


def point_of(layers: Mapping[str, LayerStats], calls: int, images: int) -> Point:
    """Snapshot of the current statistics."""
    stats = [layers[name] for name in sorted(layers)]
    return Point(calls, images, _float32([s.sensitivity for s in stats]), _float32([s.level for s in stats]))


def _float32(values: list[float]) -> torch.Tensor:
    # Values beyond float32 must not become infinity, which is refused when the session is loaded.
    largest = torch.finfo(torch.float32).max
    return torch.tensor(values, dtype=torch.float64).clamp(max=largest).to(torch.float32)


def joined(*histories: Iterable[Point]) -> History:
    """All points sorted by calls, at most ``MAX_POINTS``.

    Excess points are discarded where they lie closest in log(calls); the first and last stay.
    """
    points = sorted((p for history in histories for p in history), key=lambda p: (p.calls, p.images))
    while len(points) > MAX_POINTS:
        gaps = [math.log(after.calls / before.calls) for before, after in zip(points, points[2:], strict=False)]
        points.pop(1 + gaps.index(min(gaps)))
    return tuple(points)


def to_record(history: History) -> dict[str, torch.Tensor]:
    """The form that is saved."""
    return {key: _stacked([getattr(point, key) for point in history]) for key in KEYS}


def _stacked(values: list[Any]) -> torch.Tensor:
    return torch.stack(values) if isinstance(values[0], torch.Tensor) else torch.tensor(values, dtype=torch.int64)


def from_record(record: object, layers: int, calls: int) -> History:
    """The history of a session with ``layers`` layers and ``calls`` calls; empty if ``record`` is None.

    Raises:
        KeyError, ValueError: not a record made by ``to_record``.
    """
    if record is None:
        return ()
    expected = {key: ((), torch.int64) if key in COUNTS else ((layers,), torch.float32) for key in KEYS}
    entries = checked(record, dict)
    columns = {key: checked(entries[key], torch.Tensor) for key in KEYS}
    points = columns["calls"].numel()
    shapes = {key: (points, *rest) for key, (rest, _) in expected.items()}
    if not 0 < points <= MAX_POINTS or any(tuple(columns[key].shape) != shapes[key] for key in KEYS):
        raise ValueError(f"a history of shapes {[tuple(t.shape) for t in columns.values()]}")
    if any(columns[key].dtype != dtype or columns[key].layout != torch.strided for key, (_, dtype) in expected.items()):
        raise ValueError("a history of other types")
    counts, images = columns["calls"].tolist(), columns["images"].tolist()
    if not 0 < min(counts) <= max(counts) <= calls or counts != sorted(counts) or min(images) < 0:
        raise ValueError(f"a history at {counts} calls, {images} images")
    for key in ("sensitivity", "level"):
        if not bool((columns[key].isfinite() & (columns[key] >= 0)).all()):
            raise ValueError(f"a history whose {key} is not finite and positive")
    return tuple(map(Point, counts, images, columns["sensitivity"].unbind(), columns["level"].unbind()))
