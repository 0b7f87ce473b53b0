"""Second moments of a layer's inputs: G = XᵀX / n, from which the error of any rounding follows without a forward.

For a rounding error Δ = Ŵ - W the mean squared change of the layer's output is tr(Δ G Δᵀ) per row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch.nn import functional

from .errors import LayerError

# Columns of the second moments that are summed in one product. They are symmetric: with 512 at a time a layer of 2,880
# columns or more takes 1.7 to 1.9 times less than the whole product does (2 CPU threads).
PANEL = 512


@dataclass(frozen=True)
class Window:
    """Which inputs a convolution's output pixel sees; the defaults are those of a Linear."""

    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)


LINEAR = Window()


def input_rows(x: torch.Tensor, kind: str, window: Window = LINEAR) -> Iterator[torch.Tensor]:
    """Rows whose product with the flattened weight [out, k] is the layer's output, float32 [n, k], in parts.

    Args:
        x: Linear: [..., in], one part; Conv2d: [B, C, H, W] or [C, H, W], one part an image, k = C·kh·kw.
    """
    if kind == "Linear":
        yield x.reshape(-1, x.shape[-1]).to(torch.float32)
        return
    for image in x if x.dim() == 4 else x[None]:
        columns = functional.unfold(
            image[None].to(torch.float32),
            window.kernel,
            dilation=window.dilation,
            padding=window.padding,
            stride=window.stride,
        )
        yield columns[0].T


def row_count(x: torch.Tensor, kind: str, window: Window = LINEAR) -> int:
    """How many rows ``input_rows`` makes of these inputs."""
    if kind == "Linear":
        return x.numel() // x.shape[-1]
    count = len(x) if x.dim() == 4 else 1
    sides = zip(x.shape[-2:], window.kernel, window.stride, window.padding, window.dilation, strict=True)
    for side, kernel, stride, padding, dilation in sides:
        count *= (side + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
    return count


@dataclass(frozen=True)
class Moments:
    """Of the input rows of a layer.

    Attributes:
        gram: G = XᵀX / n, float32 [k, k].
        mean: of the rows, float32 [k].
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
        name: of the layer, for errors.
        width: k.
        device: to sum on; None: that of the inputs.
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
        # Divided at the end: a running mean would round once a call more.
        for start in range(0, self.width, PANEL):
            panel = slice(start, start + PANEL)
            self._sum[start:, panel].addmm_(rows[:, start:].T, rows[:, panel])
        self._mean += rows.sum(0, dtype=torch.float64)
        self.rows += len(rows)

    def moments(self) -> Moments:
        """What was added so far, given away: there is one such matrix in memory.

        Raises:
            LayerError: that is nothing, or a value is not finite.
        """
        if self._sum is None or self._mean is None:
            raise no_finite_input(self.name, "no input")
        if not bool(self._sum.diagonal().isfinite().all()):
            raise no_finite_input(self.name, "NaN or infinity")
        gram, self._sum = mirrored_(self._sum.div_(self.rows)), None
        return Moments(gram, (self._mean / self.rows).float(), self.rows)


def mirrored_(lower: torch.Tensor) -> torch.Tensor:
    """A square matrix whose part right of the panels on its diagonal becomes what is below them, in place."""
    for stop in range(PANEL, len(lower), PANEL):
        panel = slice(stop - PANEL, stop)
        lower[panel, stop:] = lower[stop:, panel].T
    return lower


def require_width(name: str, rows: torch.Tensor, width: int) -> None:
    """Raise LayerError for input rows [n, k] of another k."""
    if rows.shape[-1] != width:
        raise LayerError(
            f"Layer {name}, input rows",
            got=f"{rows.shape[-1]} columns",
            expected=f"{width}",
            remedy="This model feeds the layer in a way HSWQ does not know; please report it with its name.",
        )


def no_finite_input(name: str, got: str) -> LayerError:
    """The error of a layer whose inputs cannot be used."""
    return LayerError(
        f"Layer {name}, its input",
        got=got,
        expected="finite inputs",
        remedy="Calibrate again with a workflow that draws good pictures.",
    )


def output_error(delta: torch.Tensor, gram: torch.Tensor) -> float:
    """tr(Δ G Δᵀ): mean squared change of a layer's output, summed over its channels.

    Args:
        delta: Ŵ - W, [out, ...], flattened to [out, k]; of a grouped convolution [out, k / groups].
        gram: G [k, k].
    """
    rows = over_all_inputs(delta.reshape(len(delta), -1).to(torch.float32), len(gram))
    return float(((rows @ gram.to(rows.device)) * rows).sum(dtype=torch.float64))


def over_all_inputs(rows: torch.Tensor, columns: int) -> torch.Tensor:
    """[out, k / groups] -> [out, k]: zero for the inputs of the other groups."""
    groups = columns // rows.shape[1]
    blocks = rows.chunk(groups)
    return rows if groups == 1 else torch.block_diag(*blocks)
