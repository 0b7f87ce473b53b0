"""Compensated rounding: column by column, each column's rounding error is made good by the columns after it.

GPTQ (Frantar et al. 2022, arXiv 2210.17323) with the true cast of an 8-bit float grid as its rounding, in the form
that needs no inverse (LDLQ, Chee et al. 2023, arXiv 2307.13304, who show that both give the same codes): with the
layer's input second moments G, H = G + damping = L Lᵀ, and the columns sorted by rising diagonal, they are visited from
the last to the first; to column j the errors e_i = w_i - ŵ_i of those already rounded are added as
Σ_{i>j} e_i · L_ij / L_jj, which is the least-squares answer of the columns still free.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .cholesky import Tick, factorize_

DAMPING = 0.01  # of the mean diagonal; GPTQ's value
MOST_DAMPING = 1.0
BLOCK = 128

Cast = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Rounded:
    """A rounded weight.

    Attributes:
        weight: values on the grid, in the shape of the source, float32.
        damping: what the Cholesky factor needed, as a share of the mean diagonal; where not even ``MOST_DAMPING`` or
            more gives one, columns are rounded to nearest.
        dead: columns that no input ever reached.
    """

    weight: torch.Tensor
    damping: float
    dead: int


def never_cancelled() -> None:
    """A tick that lets everything go on."""


def compensated(
    w: torch.Tensor, gram: torch.Tensor, cast: Cast, *, damping: float = DAMPING, tick: Tick = never_cancelled
) -> Rounded:
    """Round ``w`` so that the error of its outputs, not of its weights, is small.

    Args:
        w: finite weight [out, ...], flattened to [out, k]; float32.
        gram: G [k, k], float32, on the device of ``w``.
        cast: values -> nearest values on the grid, any shape.
        damping: of the mean diagonal, added to it; ten times as much is tried until the factor exists.
        tick: called every second or so of work; may raise to cancel.
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
    plain = gram.diagonal().clone()
    mean = plain[~dead].mean() if not bool(dead.all()) else plain.new_ones(())
    plain[dead] = mean
    while True:
        h = gram[order[:, None], order]
        h.diagonal().copy_(plain[order] + damping * mean)
        if factorize_(h, tick):
            return h, damping
        if damping >= MOST_DAMPING:
            return h.zero_().fill_diagonal_(1.0), damping  # nearest: nothing to compensate with
        damping *= 10


def _sweep(w: torch.Tensor, lower: torch.Tensor, cast: Cast, tick: Tick) -> torch.Tensor:
    """Columns of ``w`` [out, k] rounded from the last to the first."""
    rounded, errors = torch.empty_like(w), torch.empty_like(w)
    columns = w.shape[1]
    for stop in range(columns, 0, -BLOCK):
        tick()
        start = max(0, stop - BLOCK)
        share = lower[:, start:stop] / lower.diagonal()[start:stop]
        # Transposed, a column is one piece of memory: two to three times as fast.
        block = (w[:, start:stop] + errors[:, stop:] @ share[stop:]).T.contiguous()
        own, done = share[start:stop], torch.empty_like(block)
        missed = w[:, start:stop].T.contiguous()
        for j in reversed(range(stop - start)):
            done[j] = cast(block[j])
            missed[j] -= done[j]
            block[:j].addr_(own[j, :j], missed[j])
        rounded[:, start:stop], errors[:, start:stop] = done.T, missed.T
    return rounded
