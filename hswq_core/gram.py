"""Second moments of a layer's inputs: G = XᵀX / n, from which the error of any rounding follows without a forward.

For a rounding error Δ = Ŵ - W the mean squared change of the layer's output is tr(Δ G Δᵀ) per row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn import functional

from .errors import LayerError


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


class Gram:
    """Accumulates moments over calls, on the device of the inputs.

    Args:
        name: of the layer, for errors.
        width: k.
    """

    def __init__(self, name: str, width: int) -> None:
        self.name, self.width, self.rows = name, width, 0
        self._sum: torch.Tensor | None = None
        self._mean: torch.Tensor | None = None

    def add(self, rows: torch.Tensor) -> None:
        """Add float32 rows [n, k]."""
        if rows.shape[-1] != self.width:
            raise LayerError(
                f"Layer {self.name}, input rows",
                got=f"{rows.shape[-1]} columns",
                expected=f"{self.width}",
                remedy="This model feeds the layer in a way HSWQ does not know; please report it with its name.",
            )
        if self._sum is None or self._mean is None:
            self._sum = torch.zeros(self.width, self.width, dtype=torch.float32, device=rows.device)
            self._mean = torch.zeros(self.width, dtype=torch.float64, device=rows.device)
        # Divided at the end: a running mean would round once a call more.
        self._sum.addmm_(rows.T, rows)
        self._mean += rows.sum(0, dtype=torch.float64)
        self.rows += len(rows)

    def moments(self) -> Moments:
        """What was added so far. Raises LayerError if that is nothing, or a value is not finite."""
        if self._sum is None or self._mean is None or not bool(self._sum.isfinite().all()):
            raise LayerError(
                f"Layer {self.name}, second moments of its input",
                got="no input" if self._sum is None else "NaN or infinity",
                expected="finite inputs",
                remedy="Calibrate again with a workflow that draws good pictures.",
            )
        return Moments(self._sum / self.rows, (self._mean / self.rows).float(), self.rows)


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
