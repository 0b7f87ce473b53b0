"""Second moments of a layer's inputs, G = XᵀX / n: they give the output error of any rounding without a forward.

For a rounding error Δ = Ŵ - W the mean squared change of the layer's output is tr(Δ G Δᵀ) per row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..errors import LayerError

# Columns of the second moments summed in one product. Only the lower part is computed, since they are symmetric: with
# 512 at a time, layers of 2,880 columns or more are 1.7 to 1.9 times faster than with one full product (2 CPU threads).
PANEL = 512


@dataclass(frozen=True)
class Moments:
    """First and second moments of a layer's input rows.

    Attributes:
        gram: G = XᵀX / n, float32 [k, k].
        mean: mean row, float32 [k].
        rows: n.
    """

    gram: torch.Tensor
    mean: torch.Tensor
    rows: int

    def to(self, device: torch.device) -> Moments:
        """The same on another device."""
        return replace(self, gram=self.gram.to(device), mean=self.mean.to(device))

    def error(self, delta: torch.Tensor) -> float:
        """Mean squared change of the layer's output, summed over its channels; see ``output_error``."""
        return output_error(delta, self.gram)


class Gram:
    """Accumulates moments over calls.

    Args:
        name: the layer's name, for errors.
        width: k.
        device: where to accumulate; None: the device of the inputs.
    """

    def __init__(self, name: str, width: int, device: torch.device | None = None) -> None:
        self.name, self.width, self.rows, self.device = name, width, 0, device
        self._sum: torch.Tensor | None = None
        self._mean: torch.Tensor | None = None

    def add(self, rows: torch.Tensor) -> None:
        """Add float32 rows [n, k]."""
        require_width(self.name, rows, self.width)
        rows = rows.to(self.device or rows.device)
        if self._sum is None or self._mean is None:
            self._sum = torch.zeros(self.width, self.width, dtype=torch.float32, device=rows.device)
            self._mean = torch.zeros(self.width, dtype=torch.float64, device=rows.device)
        # Divided at the end: a running mean would add a rounding per call.
        for start in range(0, self.width, PANEL):
            panel = slice(start, start + PANEL)
            self._sum[start:, panel].addmm_(rows[:, start:].T, rows[:, panel])
        self._mean += rows.sum(0, dtype=torch.float64)
        self.rows += len(rows)

    def moments(self) -> Moments:
        """The moments so far. Reuses the accumulator in place, so that only one such matrix is in memory.

        Raises:
            LayerError: no rows were added, or a value is not finite.
        """
        if self._sum is None or self._mean is None:
            raise no_finite_input(self.name, "no input")
        if not bool(self._sum.diagonal().isfinite().all()):
            raise no_finite_input(self.name, "NaN or infinity")
        gram, self._sum = mirrored_(self._sum.div_(self.rows)), None
        return Moments(gram, (self._mean / self.rows).float(), self.rows)


def mirrored_(lower: torch.Tensor) -> torch.Tensor:
    """Complete a symmetric matrix in place: mirror the part below the diagonal panels to their right."""
    for stop in range(PANEL, len(lower), PANEL):
        panel = slice(stop - PANEL, stop)
        lower[panel, stop:] = lower[stop:, panel].T
    return lower


def require_width(name: str, rows: torch.Tensor, width: int) -> None:
    """Raise LayerError unless the input rows [n, k] have k = ``width``."""
    if rows.shape[-1] != width:
        raise LayerError(
            f"Layer {name}, input rows",
            got=f"{rows.shape[-1]} columns",
            expected=f"{width}",
            remedy="This model feeds the layer in a way HSWQ does not know; please report it with its name.",
        )


def no_finite_input(name: str, got: str) -> LayerError:
    """The error for a layer with unusable inputs."""
    return LayerError(
        f"Layer {name}, its input",
        got=got,
        expected="finite inputs",
        remedy="Calibrate again with a workflow that draws good pictures.",
    )


def output_error(delta: torch.Tensor, gram: torch.Tensor) -> float:
    """tr(Δ G Δᵀ): mean squared change of a layer's output, summed over its channels.

    Args:
        delta: Ŵ - W, [out, ...], flattened to [out, k]; [out, k / groups] for a grouped convolution.
        gram: G [k, k].
    """
    rows = over_all_inputs(delta.reshape(len(delta), -1).to(torch.float32), len(gram))
    return float(((rows @ gram.to(rows.device)) * rows).sum(dtype=torch.float64))


def over_all_inputs(rows: torch.Tensor, columns: int) -> torch.Tensor:
    """[out, k / groups] -> [out, k]: block-diagonal, zero for the inputs of the other groups."""
    groups = columns // rows.shape[1]
    blocks = rows.chunk(groups)
    return rows if groups == 1 else torch.block_diag(*blocks)


@dataclass(frozen=True)
class Rows:
    """Held-out input rows of a layer, used to choose between roundings.

    There are few: about 100 MB for a convolution of 2,560 channels, whose second moments take 2.1 GB.

    Attributes:
        matrix: float32 [n, k].
        mean: mean row, float32 [k].
    """

    matrix: torch.Tensor
    mean: torch.Tensor

    def to(self, device: torch.device) -> Rows:
        """The same on another device."""
        return Rows(self.matrix.to(device), self.mean.to(device))

    def error(self, delta: torch.Tensor) -> float:
        """Mean squared change |Δ x|² of the layer's output, summed over its channels; like ``Moments.error``."""
        rows = over_all_inputs(delta.reshape(len(delta), -1).to(torch.float32), self.matrix.shape[1])
        return float((self.matrix @ rows.T).square().sum(dtype=torch.float64)) / len(self.matrix)


class Held:
    """Collects held-out rows, converting them to moments once those are smaller.

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
        # Copied: later code may modify the activation in place.
        self._parts.append(rows.to(self.device or rows.device, copy=True))
        if sum(map(len, self._parts)) > self.width:
            self._gram = Gram(self.name, self.width, self.device)
            while self._parts:
                self._gram.add(self._parts.pop(0))

    def inputs(self) -> Rows | Moments:
        """The rows or their moments. Raises LayerError if no rows were added, or a value is not finite."""
        if self._gram is not None:
            return self._gram.moments()
        if not self._parts:
            raise no_finite_input(self.name, "no input")
        matrix = torch.cat(self._parts)
        mean = matrix.mean(0, dtype=torch.float64).float()
        if not bool(mean.isfinite().all()):
            raise no_finite_input(self.name, "NaN or infinity")
        return Rows(matrix, mean)
