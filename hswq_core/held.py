"""Inputs of a layer that its rounding has not seen, to decide by: as rows while they are fewer than their columns.

They are few: for a convolution of 2,560 channels some 100 MB, where their second moments are 2.1 GB.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .gram import Gram, Moments, no_finite_input, over_all_inputs, require_width


@dataclass(frozen=True)
class Rows:
    """Input rows of a layer.

    Attributes:
        matrix: float32 [n, k].
        mean: of the rows, float32 [k].
    """

    matrix: torch.Tensor
    mean: torch.Tensor

    def to(self, device: torch.device) -> Rows:
        """The same on another device."""
        return Rows(self.matrix.to(device), self.mean.to(device))

    def error(self, delta: torch.Tensor) -> float:
        """Mean squared change |Δ x|² of the layer's output, summed over its channels; as ``Moments.error``."""
        rows = over_all_inputs(delta.reshape(len(delta), -1).to(torch.float32), self.matrix.shape[1])
        return float((self.matrix @ rows.T).square().sum(dtype=torch.float64)) / len(self.matrix)


class Held:
    """Collects rows, and turns them into moments once those are smaller.

    Args:
        name, width, device: as for ``Gram``.
    """

    def __init__(self, name: str, width: int, device: torch.device | None = None) -> None:
        self.name, self.width, self.device = name, width, device
        self._parts: list[torch.Tensor] = []
        self._gram: Gram | None = None

    def add(self, rows: torch.Tensor) -> None:
        """Add float32 rows [n, k]."""
        require_width(self.name, rows, self.width)
        if self._gram is not None:
            self._gram.add(rows)
            return
        # Copied: an activation may be changed in place behind the layer.
        self._parts.append(rows.to(self.device or rows.device, copy=True))
        if sum(map(len, self._parts)) > self.width:
            self._gram = Gram(self.name, self.width, self.device)
            while self._parts:
                self._gram.add(self._parts.pop(0))

    def inputs(self) -> Rows | Moments:
        """What was added. Raises LayerError if that is nothing, or a value is not finite."""
        if self._gram is not None:
            return self._gram.moments()
        if not self._parts:
            raise no_finite_input(self.name, "no input")
        matrix = torch.cat(self._parts)
        mean = matrix.mean(0, dtype=torch.float64).float()
        if not bool(mean.isfinite().all()):
            raise no_finite_input(self.name, "NaN or infinity")
        return Rows(matrix, mean)
