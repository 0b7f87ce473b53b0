"""HSWQ's clip search: the amax that minimizes the importance-weighted error over a histogram of |w|."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .grid import Grid
from .metrics import weighted_mse

BINS = 4096
CANDIDATES = 200
REFINEMENTS = 3
FIRST_RANGE = (0.5, 1.0)  # of max|w|
ALLOWED_RANGE = (0.1, 1.2)  # of max|w|
# A refinement's range reaches a quarter of the range before it to either side of the best candidate.
REFINEMENT_SHRINK = 0.25
# Errors this close, relatively, are equal: they differ by the rounding of their float64 sums alone. Unscaled,
# whole ranges of limits are equally good, and noise would choose among them.
TIE = 1e-12


@dataclass(frozen=True)
class Histogram:
    """Importance-weighted histogram of |w|.

    Attributes:
        centers: float64 [bins], bin centres over [0, max].
        mass: float64 [bins], Σ importance of the weights in each bin.
        max: max|w|.
    """

    centers: torch.Tensor
    mass: torch.Tensor
    max: float


@dataclass(frozen=True)
class Clip:
    """The chosen clip limit.

    Attributes:
        amax: clip limit.
        mse: weighted error of the tensor at ``amax``, Σ I·(q(w)−w)² / Σ I.
        mse_at_max: the same at max|w|; ``mse`` ≤ it always.
    """

    amax: float
    mse: float
    mse_at_max: float


def weighted_histogram(w: torch.Tensor, importance: torch.Tensor | None, bins: int = BINS) -> Histogram:
    """Histogram of |w| over [0, max|w|], each weight counted with the importance of its input channel.

    Args:
        w: weight of any shape and floating dtype, not all zero.
        importance: broadcastable over ``w``, or None for uniform.
    """
    magnitude = w.abs().to(torch.float32)
    top = magnitude.max().item()
    # Divided first: bins / max overflows float32 for a layer of denormal weights.
    index = (magnitude / top * bins).to(torch.int32).clamp_(max=bins - 1).flatten()
    weight = None if importance is None else importance.to(torch.float64).expand_as(w).flatten()
    mass = torch.bincount(index, weights=weight, minlength=bins).to(torch.float64)
    centers = (torch.arange(bins, dtype=torch.float64, device=w.device) + 0.5) * (top / bins)
    return Histogram(centers, mass, top)


def histogram_errors(hist: Histogram, amax: torch.Tensor, grid: Grid, *, scaled: bool) -> torch.Tensor:
    """Σ H·(q(x) − x)² / Σ H for each candidate.

    Args:
        amax: float64 [k] clip limits.

    Returns:
        float64 [k]; all candidates × bins in one pass with the real cast.
    """
    x = hist.centers.to(torch.float32)
    limit = amax.to(torch.float32).unsqueeze(1)
    if scaled:
        scale = grid.scale(limit)
        q = grid.cast(x / scale).to(torch.float32).mul_(scale)
    else:
        q = grid.cast(torch.minimum(x, limit)).to(torch.float32)
    squared = q.sub_(x).square_()
    total = hist.mass.sum().clamp(min=torch.finfo(torch.float64).tiny)
    return squared.to(torch.float64) @ hist.mass / total


def search_histogram(hist: Histogram, grid: Grid, *, scaled: bool) -> float:
    """The clip limit of least histogram error: 200 candidates in [0.5, 1]·max, then three refinements.

    max|w| is a candidate of every round; the smallest of equally good limits wins, as in the original.
    Without importance anywhere (a dead input) every limit is equally good and nothing is clipped.
    """
    if not bool((hist.mass > 0).any()):
        return hist.max
    low, high = (f * hist.max for f in FIRST_RANGE)
    floor, ceiling = (f * hist.max for f in ALLOWED_RANGE)
    best, best_error = hist.max, torch.inf
    for _ in range(REFINEMENTS + 1):
        tries = torch.linspace(low, high, CANDIDATES, dtype=torch.float64, device=hist.mass.device)
        tries = torch.cat((tries, tries.new_tensor([hist.max])))
        errors = histogram_errors(hist, tries, grid, scaled=scaled)
        least = errors.min()
        if least.item() < best_error * (1 - TIE):
            best, best_error = tries[errors <= least * (1 + TIE)].min().item(), least.item()
        reach = (high - low) * REFINEMENT_SHRINK
        low, high = max(floor, best - reach), min(ceiling, best + reach)
    return best


def search_amax(w: torch.Tensor, importance: torch.Tensor | None, grid: Grid, *, scaled: bool) -> Clip:
    """Clip limit for ``w``, never worse than max|w| on the tensor itself.

    Args:
        w: weight, any floating dtype.
        importance: broadcastable over ``w`` or None.
        scaled: whether the grid moves with amax (V2, comfy Linear) or not (V1).
    """
    w = w.to(torch.float32)
    top = w.abs().max().item() if w.numel() else 0.0
    if top == 0.0:
        return Clip(0.0, 0.0, 0.0)
    found = search_histogram(weighted_histogram(w, importance), grid, scaled=scaled)
    at_max = weighted_mse(w, grid.fake_quantize(w, top, scaled=scaled), importance)
    at_found = weighted_mse(w, grid.fake_quantize(w, found, scaled=scaled), importance)
    return Clip(found, at_found, at_max) if at_found <= at_max else Clip(top, at_max, at_max)
