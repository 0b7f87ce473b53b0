"""Compensated rounding: each column's rounding error is compensated by the columns after it.

GPTQ (Frantar et al. 2022, arXiv 2210.17323) with the true cast to an 8-bit float grid as its rounding, in the form that
needs no inverse (LDLQ, Chee et al. 2023, arXiv 2307.13304, who show that both give the same codes): with the layer's
input second moments G, H = G + damping = L Lᵀ and columns sorted by ascending diagonal, columns are visited from last
to first, and column j is shifted by the errors e_i = w_i - ŵ_i of those already rounded, Σ_{i>j} e_i · L_ij / L_jj,
which is the least-squares response of the columns still free.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .cholesky import Tick, factorize_

DAMPING = 0.01  # relative to the mean diagonal; GPTQ's value
MOST_DAMPING = 1.0
BLOCK = 128

Cast = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Rounded:
    """A rounded weight.

    Attributes:
        weight: values on the grid, in the shape of the source, float32.
        damping: needed for the Cholesky factorization, relative to the mean diagonal; if it fails even at
            ``MOST_DAMPING`` or more, columns are rounded to nearest.
        dead: number of columns whose input is always zero.
    """

    weight: torch.Tensor
    damping: float
    dead: int


def never_cancelled() -> None:
    """A tick that never cancels."""


def compensated(
    w: torch.Tensor, gram: torch.Tensor, cast: Cast, *, damping: float = DAMPING, tick: Tick = never_cancelled
) -> Rounded:
    """Round ``w`` to minimize the error of its outputs rather than of its weights.

    Args:
        w: finite weight [out, ...], flattened to [out, k]; float32.
        gram: G [k, k], float32, on the device of ``w``.
        cast: values -> nearest values on the grid, any shape.
        damping: added to the diagonal, relative to its mean; multiplied by ten until the factorization succeeds.
        tick: called about once per second of work; may raise to cancel.
    """
    rows = w.reshape(len(w), -1).to(torch.float32)
    dead = gram.diagonal() <= 0
    order = gram.diagonal().argsort()
    factor, used = _factor(gram, dead, order, damping, tick)
    rounded = torch.empty_like(rows)
    rounded[:, order] = _sweep(rows[:, order], factor, cast, tick)
    rounded[:, dead] = cast(rows[:, dead])
    return Rounded(rounded.reshape(w.shape), used, int(dead.sum()))


def _factor(
    gram: torch.Tensor, dead: torch.Tensor, order: torch.Tensor, damping: float, tick: Tick
) -> tuple[torch.Tensor, float]:
    """(lower Cholesky factor of the damped, reordered moments, damping used)."""
    diagonal = gram.diagonal().clone()
    mean = diagonal[~dead].mean() if not bool(dead.all()) else diagonal.new_ones(())
    diagonal[dead] = mean
    while True:
        h = gram[order[:, None], order]
        h.diagonal().copy_(diagonal[order] + damping * mean)
        if factorize_(h, tick):
            return h, damping
        if damping >= MOST_DAMPING:
            return h.zero_().fill_diagonal_(1.0), damping  # round to nearest: no compensation
        damping *= 10


def _sweep(w: torch.Tensor, lower: torch.Tensor, cast: Cast, tick: Tick) -> torch.Tensor:
    """Round the columns of ``w`` [out, k] from last to first."""
    rounded, errors = torch.empty_like(w), torch.empty_like(w)
    columns = w.shape[1]
    for stop in range(columns, 0, -BLOCK):
        tick()
        start = max(0, stop - BLOCK)
        share = lower[:, start:stop] / lower.diagonal()[start:stop]
        # Transposed, each column is contiguous: two to three times as fast.
        block = (w[:, start:stop] + errors[:, stop:] @ share[stop:]).T.contiguous()
        own, done = share[start:stop], torch.empty_like(block)
        error = w[:, start:stop].T.contiguous()
        for j in reversed(range(stop - start)):
            done[j] = cast(block[j])
            error[j] -= done[j]
            block[:j].addr_(own[j, :j], error[j])
        rounded[:, start:stop], errors[:, start:stop] = done.T, error.T
    return rounded
