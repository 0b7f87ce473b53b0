"""HSWQ's clip search: the amax that minimizes the importance-weighted error over a histogram of |w|."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ..errors import LayerError
from .grid import PIECE, largest
from .metrics import weighted_square_sum
from .schemes.scheme import Scheme

BINS = 4096
CANDIDATES = 200
REFINEMENTS = 3
FIRST_RANGE = (0.5, 1.0)  # of max|w|
ALLOWED_RANGE = (0.1, 1.2)  # of max|w|
# Each refinement spans a quarter of the previous range on either side of the best candidate.
REFINEMENT_SHRINK = 0.25
# Errors within this relative distance are ties: they differ only by the rounding of their float64 sums. Without a
# scale, whole ranges of limits are equally good, and noise would pick one.
TIE = 1e-12


@dataclass(frozen=True)
class Histogram:
    """Importance-weighted histogram of |w|.

    Attributes:
        centers: float64 [bins], bin centres over [0, max].
        mass: float64 [bins], summed importance of the weights in each bin.
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
        mse_at_max: the same at max|w|; always ≥ ``mse``.
    """

    amax: float
    mse: float
    mse_at_max: float


def weighted_histogram(w: torch.Tensor, importance: torch.Tensor | None, bins: int = BINS) -> Histogram:
    """Histogram of |w| over [0, max|w|], each weight counted by the importance of its input channel.

    Args:
        w: weight of any shape and floating dtype, not all zero.
        importance: broadcastable over ``w``, or None for uniform.
    """
    top = largest(w)
    mass = torch.zeros(bins, dtype=torch.float64, device=w.device)
    for piece, weight in _pieces(w, importance):
        # Divide first: bins / max overflows float32 for a layer of denormal weights.
        index = piece.abs().div_(top).mul_(bins).to(torch.int32).clamp_(max=bins - 1).flatten()
        each = None if weight is None else weight.to(torch.float64).expand_as(piece).flatten()
        mass += torch.bincount(index, weights=each, minlength=bins)
    centers = (torch.arange(bins, dtype=torch.float64, device=w.device) + 0.5) * (top / bins)
    return Histogram(centers, mass, top)


def histogram_errors(hist: Histogram, amax: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Σ H·(q(x) − x)² / Σ H for each candidate.

    Args:
        amax: float64 [k] clip limits.

    Returns:
        float64 [k]; all candidates × bins in one pass, using the real cast.
    """
    x = hist.centers.to(torch.float32)
    squared = scheme.rounded(x, scheme.limited(amax.to(torch.float32).unsqueeze(1))).sub_(x).square_()
    total = hist.mass.sum().clamp(min=torch.finfo(torch.float64).tiny)
    return squared.to(torch.float64) @ hist.mass / total


def search_histogram(hist: Histogram, scheme: Scheme) -> float:
    """The clip limit with the least histogram error: 200 candidates in [0.5, 1]·max, then three refinements.

    max|w| is a candidate in every round; ties go to the smallest limit, as in the original.
    If all importance is zero (a dead input), every limit is equally good and nothing is clipped.
    """
    if not bool((hist.mass > 0).any()):
        return hist.max
    low, high = (f * hist.max for f in FIRST_RANGE)
    floor, ceiling = (f * hist.max for f in ALLOWED_RANGE)
    best, best_error = hist.max, torch.inf
    for _ in range(REFINEMENTS + 1):
        tries = torch.linspace(low, high, CANDIDATES, dtype=torch.float64, device=hist.mass.device)
        tries = torch.cat((tries, tries.new_tensor([hist.max])))
        errors = histogram_errors(hist, tries, scheme)
        least = errors.min()
        if least.item() < best_error * (1 - TIE):
            best, best_error = tries[errors <= least * (1 + TIE)].min().item(), least.item()
        reach = (high - low) * REFINEMENT_SHRINK
        low, high = max(floor, best - reach), min(ceiling, best + reach)
    return best


def search_amax(w: torch.Tensor, importance: torch.Tensor | None, scheme: Scheme) -> Clip:
    """Clip limit for ``w``, never worse than max|w| on the tensor itself.

    Args:
        w: weight, any floating dtype.
        importance: broadcastable over ``w`` or None.
        scheme: per-tensor, or without a scale; in the latter the grid does not move with amax.
    """
    if not w.numel() or largest(w) == 0.0:
        return Clip(0.0, 0.0, 0.0)
    hist = weighted_histogram(w, importance)
    amax = search_histogram(hist, scheme)
    at_max, at_amax = clip_errors(w, importance, (hist.max, amax), scheme)
    return Clip(amax, at_amax, at_max) if at_amax <= at_max else Clip(hist.max, at_max, at_max)


def clip_errors(
    w: torch.Tensor, importance: torch.Tensor | None, limits: Sequence[float], scheme: Scheme
) -> list[float]:
    """Σ I·(q(w)−w)² / Σ I of the tensor itself at each clip limit; 0 if all importance is zero."""
    errors = torch.zeros(len(limits), dtype=torch.float64, device=w.device)
    total = torch.zeros((), dtype=torch.float64, device=w.device)
    for piece, weight in _pieces(w, importance):
        for i, limit in enumerate(limits):
            errors[i] += weighted_square_sum(piece, scheme.rounded(piece, scheme.at(limit, w.device)), weight)
        share = torch.ones(1, device=w.device) if weight is None else weight
        total += share.sum(dtype=torch.float64) * (piece.numel() / share.numel())
    mean: list[float] = torch.where(total > 0, errors / total, torch.zeros_like(errors)).tolist()
    return mean


def _pieces(w: torch.Tensor, importance: torch.Tensor | None) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """(float32 rows of ``w``, importance that broadcasts over them), in order; a single piece on a GPU."""
    rows = len(w) if w.device.type != "cpu" else max(1, PIECE // w[0].numel())
    if importance is not None:
        leading = len(importance) if importance.dim() == w.dim() else 1
        # Materialized for one row, or for all rows if they differ (grouped convolutions): broadcasting is slow.
        importance = importance.expand(leading, *w.shape[1:]).contiguous()
    for start in range(0, len(w), rows):
        weight = importance
        if weight is not None and len(weight) > 1:
            weight = weight[start : start + rows]
        yield w[start : start + rows].to(torch.float32), weight


def importance_over_weight(name: str, shape: tuple[int, ...], importance: torch.Tensor) -> torch.Tensor:
    """Broadcast a per-input-channel vector over a weight.

    Args:
        name: layer name, for the message.
        shape: weight shape, [out, in] or [out, in / groups, kh, kw].
        importance: [C_in], C_in = in (all groups together).

    Returns:
        float32 [1, in, 1...] or, for a grouped convolution, [out, in / groups, 1, 1].

    Raises:
        LayerError: wrong length, or negative or non-finite values.
    """
    out_channels, per_group = shape[0], shape[1]
    channels = importance.numel()
    groups, rest = divmod(channels, per_group)
    is_linear = len(shape) == 2
    wrong = rest or groups == 0 or out_channels % max(groups, 1) or (is_linear and groups != 1)
    if importance.dim() != 1 or wrong:
        raise LayerError(
            f"Layer {name}, importance",
            got=f"{tuple(importance.shape)} values",
            expected=f"{per_group} per group of a weight of shape {shape}",
            remedy="The session does not belong to this model; calibrate again under a new session name.",
        )
    if not bool(importance.isfinite().all()) or bool((importance < 0).any()):
        raise LayerError(
            f"Layer {name}, importance",
            got="negative or non-finite values",
            expected="finite values ≥ 0",
            remedy="The session is damaged; calibrate again under a new session name.",
        )
    tail = (1,) * (len(shape) - 2)
    if groups == 1:
        return importance.float().view(1, per_group, *tail)
    rows = importance.float().view(groups, per_group).repeat_interleave(out_channels // groups, dim=0)
    return rows.view(out_channels, per_group, *tail)
