"""Kinds of layers that are observed and quantized, one row each. All differences between them live here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from ..errors import LayerError


@dataclass(frozen=True)
class Window:
    """The inputs one output depends on: a convolution's kernel window, or one position for a Linear (the defaults)."""

    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)


ONE_POSITION = Window()


@dataclass(frozen=True)
class LayerKind:
    """One row.

    Attributes:
        name: type name of the module. Not its class: ComfyUI's mixed-precision Linear does not subclass
            torch.nn.Linear.
        rank: rank of the weight.
        input_ranks: input ranks the layer accepts.
        axis: the input's channel axis, counted from the end.
        grouped: whether output channels may depend on only some of the input channels.
        channels: module -> C_in over all groups.
        window: module -> the inputs one output depends on.
        rows: (x, window) -> im2col rows, whose product with the flattened weight [out, k] is the output, float32
            [n, k], in parts.
        count: (x, window) -> number of rows that ``rows`` yields for x.
        columns: module -> k over all groups.
        apply: (module, x, weight, bias or None) -> the layer's output with this weight.
    """

    name: str
    rank: int
    input_ranks: tuple[int, ...]
    axis: int
    grouped: bool
    channels: Callable[[Any], int]
    window: Callable[[Any], Window]
    rows: Callable[[torch.Tensor, Window], Iterator[torch.Tensor]]
    count: Callable[[torch.Tensor, Window], int]
    columns: Callable[[Any], int]
    apply: Callable[[Any, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]

    def channel_axis(self, rank: int, layer: str) -> int:
        """Channel axis of a ``rank``-dimensional input; LayerError, naming ``layer``, for unsupported ranks."""
        if rank in self.input_ranks:
            return rank - self.axis
        *most, last = map(str, self.input_ranks)
        raise LayerError(
            f"Layer {layer} ({self.name}), input shape",
            got=f"rank {rank}",
            expected=f"rank {', '.join(most)} or {last}",
            remedy="This model feeds the layer in a way HSWQ does not know; please report it with the model's name.",
        )


def _linear_rows(x: torch.Tensor, _window: Window) -> Iterator[torch.Tensor]:
    yield x.reshape(-1, x.shape[-1]).to(torch.float32)


def _linear_apply(_module: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return functional.linear(x, weight, bias)


def _conv2d_rows(x: torch.Tensor, window: Window) -> Iterator[torch.Tensor]:
    """One part per image of [B, C, H, W] or [C, H, W]; k = C · kh · kw."""
    for image in x if x.dim() == 4 else x[None]:
        columns = functional.unfold(
            image[None].to(torch.float32),
            window.kernel,
            dilation=window.dilation,
            padding=window.padding,
            stride=window.stride,
        )
        yield columns[0].T


def _conv2d_count(x: torch.Tensor, window: Window) -> int:
    count = len(x) if x.dim() == 4 else 1
    sides = zip(x.shape[-2:], window.kernel, window.stride, window.padding, window.dilation, strict=True)
    for side, kernel, stride, padding, dilation in sides:
        count *= (side + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
    return count


def _conv2d_apply(module: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return functional.conv2d(x, weight, bias, module.stride, module.padding, module.dilation, module.groups)


KINDS = {
    row.name: row
    for row in (
        LayerKind(
            "Linear",
            rank=2,
            input_ranks=(2, 3, 4),
            axis=1,
            grouped=False,
            channels=lambda module: int(module.in_features),
            window=lambda _module: ONE_POSITION,
            rows=_linear_rows,
            count=lambda x, _window: x.numel() // x.shape[-1],
            columns=lambda module: int(module.in_features),
            apply=_linear_apply,
        ),
        LayerKind(
            "Conv2d",
            rank=4,
            input_ranks=(3, 4),
            axis=3,
            grouped=True,
            channels=lambda module: int(module.in_channels),
            window=lambda module: Window(module.kernel_size, module.stride, module.padding, module.dilation),
            rows=_conv2d_rows,
            count=_conv2d_count,
            columns=lambda module: int(module.in_channels * module.kernel_size[0] * module.kernel_size[1]),
            apply=_conv2d_apply,
        ),
    )
}
KINDS_BY_RANK = {kind.rank: kind.name for kind in KINDS.values()}
NAMES = " and ".join(KINDS)


def kind_of(module: Any) -> LayerKind:
    """The row for a layer's module, whose type name must be in ``KINDS``."""
    return KINDS[type(module).__name__]
