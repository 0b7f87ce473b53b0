"""Rounding for input moments of low rank, G = A Aᵀ + ridge · I: exact in the codes, and no k × k matrix.

Column by column, each takes the grid's nearest value to where the loss tr(E G Eᵀ) of the errors E = Ŵ - W is least, the
columns already rounded being given. With c = Aᵀ Eᵀ, what those have missed so far, that is for column j

    ŵ_j = cast(w_j - pull_j · c).

At first the columns still to come are free, and will make good what is left; Woodbury's identity then gives
pull_j = (ridge · I + Σ_{i≥j} a_i a_iᵀ)⁻¹ a_j, and the codes are those of compensated rounding (``compensate``). In
the sweeps behind it all others are fixed and pull_j = a_j / (ridge + |a_j|²): coordinate descent (QuantEase, Behdin et
al. 2023, arXiv 2309.01885), under which the loss never rises.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .cholesky import Tick
from .gptq import Cast

# Columns whose errors reach the later ones one by one; those of a block before them come as one product.
BLOCK = 32
# A sweep that lessens the loss by a smaller share is the last. On the reference models those behind gain 0.4 % in all.
LEAST_GAIN = 5e-3


@dataclass(frozen=True)
class LowRank:
    """Second moments G = A Aᵀ + ridge · I of a layer's inputs.

    Attributes:
        a: float32 [k, r].
        ridge: more than 0.
    """

    a: torch.Tensor
    ridge: float

    def losses(self, delta: torch.Tensor) -> torch.Tensor:
        """δ G δᵀ of each row δ of ``delta`` [out, k], float64 [out]."""
        seen = (delta @ self.a).square().sum(1, dtype=torch.float64)
        return seen + self.ridge * delta.square().sum(1, dtype=torch.float64)

    def pull_of_free(self) -> torch.Tensor:
        """``pull`` [k, r] while the later columns are free; Sherman and Morrison's formula, in float64."""
        a = self.a.to("cpu", torch.float64)
        inverse = torch.eye(a.shape[1], dtype=torch.float64) / self.ridge
        pull = torch.empty_like(a)
        for j in reversed(range(len(a))):
            without = inverse @ a[j]
            pull[j] = without / (1 + a[j] @ without)
            inverse.addr_(pull[j], without, alpha=-1)
        return pull.to(self.a)

    def pull_of_fixed(self) -> torch.Tensor:
        """``pull`` [k, r] while all other columns are fixed."""
        return self.a / (self.ridge + self.a.square().sum(1, keepdim=True))


class Descent:
    """Compensated rounding, then sweeps of coordinate descent, for weights that get these inputs.

    Args:
        moments: of the inputs.
    """

    def __init__(self, moments: LowRank) -> None:
        self._order = moments.a.square().sum(1).argsort(descending=True)  # as in ``compensate``
        self._moments = LowRank(moments.a[self._order], moments.ridge)
        self._compensation = self._moments.pull_of_free()
        self._descent = self._moments.pull_of_fixed()

    def rounded(self, w: torch.Tensor, cast: Cast, *, sweeps: int, tick: Tick) -> torch.Tensor:
        """Values on the grid, [out, k].

        Args:
            w: finite rows [out, k] of a weight, float32, on the device of the moments.
            cast: values -> nearest values on the grid, any shape.
            sweeps: of coordinate descent, at most.
            tick: called every second or so of work; may raise to cancel.
        """
        columns = w[:, self._order].T.contiguous()  # transposed, a column is one piece of memory
        rounded = columns.clone()
        tick()
        _sweep(columns, rounded, self._moments.a, self._compensation, cast)
        loss = self._loss(columns, rounded)
        for _ in range(sweeps):
            tick()
            _sweep(columns, rounded, self._moments.a, self._descent, cast)
            before, loss = loss, self._loss(columns, rounded)
            if loss >= before * (1 - LEAST_GAIN):
                break
        found = torch.empty_like(w)
        found[:, self._order] = rounded.T
        return found

    def _loss(self, columns: torch.Tensor, rounded: torch.Tensor) -> float:
        return self._moments.losses((rounded - columns).T).sum().item()


def _sweep(w: torch.Tensor, rounded: torch.Tensor, a: torch.Tensor, pull: torch.Tensor, cast: Cast) -> None:
    """Round every column of ``w`` [k, out] once; ``rounded`` [k, out] is changed in place, and w where not yet."""
    missed = a.T @ (rounded - w)
    for start in range(0, len(w), BLOCK):
        part = slice(start, start + BLOCK)
        # What a column's error weighs in the targets of this block; on the diagonal its own, which does not count.
        weight = pull[part] @ a[part].T
        before = rounded[part] - w[part]
        targets = w[part] - pull[part] @ missed + weight.diagonal()[:, None] * before
        for j, target in enumerate(targets):
            rounded[start + j] = cast(target)
            change = rounded[start + j] - w[start + j] - before[j]
            targets[j + 1 :].addr_(weight[j + 1 :, j], change, alpha=-1)
        missed.addmm_(a[part].T, rounded[part] - w[part] - before)
