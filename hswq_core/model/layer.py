"""A layer of a model: what it is, which kinds there are, and the rows that its weight multiplies."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn import functional

from ..errors import LayerError


@dataclass(frozen=True)
class Layer:
    """One Linear or Conv2d of the source.

    Attributes:
        name: inside the diffusion model.
        kind: "Linear" or "Conv2d".
        shape: weight shape.
        dtype: of the source's weight.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def weights(self) -> int:
        """Number of weight elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the weight in the source."""
        return self.weights * self.dtype.itemsize


# Module kinds that are observed and quantized -> weight rank. By type name: ComfyUI's mixed-precision
# Linear is no subclass of torch.nn.Linear.
LAYER_KINDS = {"Linear": 2, "Conv2d": 4}


KINDS_BY_RANK = {rank: kind for kind, rank in LAYER_KINDS.items()}


def channel_axis(kind: str, rank: int, name: str) -> int:
    """Axis of the input channels of a ``rank``-dimensional input of a layer of ``kind``.

    Linear: the last axis of ranks 2, 3, 4. Conv2d: axis 1 of [B, C, H, W], axis 0 of [C, H, W].

    Raises:
        LayerError: any other rank.
    """
    if kind == "Linear" and rank in (2, 3, 4):
        return rank - 1
    if kind == "Conv2d" and rank in (3, 4):
        return rank - 3
    expected = "rank 2, 3 or 4" if kind == "Linear" else "rank 3 or 4"
    raise LayerError(
        f"Layer {name} ({kind}), input shape",
        got=f"rank {rank}",
        expected=expected,
        remedy="This model feeds the layer in a way HSWQ does not know; please report it with the model's name.",
    )


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
