"""Compensated rounding: column by column, each column's rounding error is made good by the columns after it.

GPTQ (Frantar et al. 2022, arXiv 2210.17323) with the true cast of an 8-bit float grid as its rounding. With the
layer's input second moments G, and H = G + damping, the columns are visited in order of falling diagonal; with U
the upper Cholesky factor of H⁻¹, the error e = (w_j - ŵ_j) / U_jj of column j is subtracted from each later column
i as e · U_ji, which is the least-squares answer of the columns still free.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

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


def compensated(w: torch.Tensor, gram: torch.Tensor, cast: Cast, *, damping: float = DAMPING) -> Rounded:
    """Round ``w`` so that the error of its outputs, not of its weights, is small.

    Args:
        w: finite weight [out, ...], flattened to [out, k]; float32.
        gram: G [k, k], float32, on the device of ``w``.
        cast: values -> nearest values on the grid, any shape.
        damping: of the mean diagonal, added to it; ten times as much is tried until the factor exists.
    """
    rows = w.reshape(len(w), -1).to(torch.float32)
    dead = gram.diagonal() <= 0
    order = gram.diagonal().argsort(descending=True)
    factor, used = _factor(gram, dead, order, damping)
    rounded = torch.empty_like(rows)
    rounded[:, order] = _sweep(rows[:, order].clone(), factor, cast)
    rounded[:, dead] = cast(rows[:, dead])
    return Rounded(rounded.reshape(w.shape), used, int(dead.sum()))


def _factor(gram: torch.Tensor, dead: torch.Tensor, order: torch.Tensor, damping: float) -> tuple[torch.Tensor, float]:
    """(upper Cholesky factor of the damped, reordered inverse, damping used)."""
    h = gram.clone()
    diagonal = h.diagonal()
    mean = diagonal[~dead].mean() if not bool(dead.all()) else diagonal.new_ones(())
    diagonal[dead] = mean
    h = h[order][:, order]
    plain = h.diagonal().clone()
    while True:
        h.diagonal().copy_(plain + damping * mean)
        lower, failed = torch.linalg.cholesky_ex(h)
        if not failed:
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
        if not failed:
            return upper, damping
        if damping >= MOST_DAMPING:
            return torch.eye(len(h), device=h.device), damping  # nearest: nothing to compensate with
        damping *= 10


def _sweep(w: torch.Tensor, upper: torch.Tensor, cast: Cast) -> torch.Tensor:
    """Columns rounded from left to right; ``w`` [out, k] is used up."""
    rounded = torch.empty_like(w)
    columns = w.shape[1]
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        # Transposed, a column is one piece of memory: two to three times as fast.
        block, factor = w[:, start:stop].T.contiguous(), upper[start:stop, start:stop]
        done, errors, diagonal = torch.empty_like(block), torch.empty_like(block), factor.diagonal()
        for j in range(stop - start):
            done[j] = cast(block[j])
            torch.sub(block[j], done[j], out=errors[j]).div_(diagonal[j])
            block[j + 1 :].addr_(factor[j, j + 1 :], errors[j], alpha=-1)
        rounded[:, start:stop] = done.T
        w[:, stop:].addmm_(errors.T, upper[start:stop, stop:], alpha=-1)
    return rounded
