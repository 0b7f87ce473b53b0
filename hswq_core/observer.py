"""Statistics of one layer, accumulated while the model runs.

Sums are kept on the device of the activations in float64 (float32 where the device has no float64) and
fetched only by ``drain``: no device synchronisation per layer and call. What layers have in common is measured
again for each: tensors made in inference mode, where ComfyUI samples, do not tell whether they were changed between.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from .errors import LayerError

# Module kinds that are observed and quantized -> weight rank. By type name: ComfyUI's mixed-precision
# Linear is no subclass of torch.nn.Linear.
LAYER_KINDS = {"Linear": 2, "Conv2d": 4}

# Calls of a layer that wait to be added up together. Two of a whole SDXL UNet take 21 MB, as much as its sums.
FOLD = 2
# Values that one thread reads while a second would be woken several times (guess, from 3 MB being three times as fast).
ALONE = 2**21
# Longest row of one float32 norm; of a constant, longer ones drift by more than 1e-5.
NORM_ROW = 4096


@dataclass
class LayerStats:
    """Sums over calls of one layer, on the CPU.

    Attributes:
        kind: "Linear" or "Conv2d".
        shape: weight shape, [out, in] or [out, in / groups, kh, kw].
        in_calls, out_calls: forwards whose input resp. output was seen (an interrupt leaves them one apart).
        out_sum, out_sq_sum: Σ mean(y), Σ mean(y²).
        abs_sum: Σ mean|x_c|, float64 [C_in].
        mean_sum: Σ mean x_c, float64 [C_in].
        input_amax: max|x| over all calls.
    """

    kind: str
    shape: tuple[int, ...]
    in_calls: int
    out_calls: int
    out_sum: float
    out_sq_sum: float
    abs_sum: torch.Tensor
    mean_sum: torch.Tensor
    input_amax: float

    @classmethod
    def empty(cls, kind: str, shape: tuple[int, ...], channels: int) -> LayerStats:
        """Nothing seen yet; ``channels`` = C_in of the layer's input."""
        zeros = torch.zeros(channels, dtype=torch.float64)
        return cls(kind, shape, 0, 0, 0.0, 0.0, zeros, zeros.clone(), 0.0)

    def merge(self, other: LayerStats) -> None:
        """Add another part of the same session: sums add, maxima combine; exact up to float64 addition."""
        self.in_calls += other.in_calls
        self.out_calls += other.out_calls
        self.out_sum += other.out_sum
        self.out_sq_sum += other.out_sq_sum
        # Not in place: sums made under inference mode cannot be updated in place outside of it.
        self.abs_sum = self.abs_sum + other.abs_sum
        self.mean_sum = self.mean_sum + other.mean_sum
        self.input_amax = max(self.input_amax, other.input_amax)

    @property
    def sensitivity(self) -> float:
        """HSWQ's output variance, E[mean y²] − E[mean y]² over calls (≥ 0)."""
        if self.out_calls == 0:
            return 0.0
        mean = self.out_sum / self.out_calls
        return max(0.0, self.out_sq_sum / self.out_calls - mean * mean)

    @property
    def importance(self) -> torch.Tensor:
        """I_c = mean over calls of mean|x_c|, float64 [C_in]."""
        return self.abs_sum / max(self.in_calls, 1)

    @property
    def input_mean(self) -> torch.Tensor:
        """E[x_c], float64 [C_in]."""
        return self.mean_sum / max(self.in_calls, 1)

    def is_finite(self) -> bool:
        """False once a NaN or infinity reached any sum."""
        channels = (self.abs_sum + self.mean_sum).sum().item()  # one of them spoils any sum it is in
        return math.isfinite(self.out_sum + self.out_sq_sum + self.input_amax + channels)


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


@contextmanager
def _one_thread(x: torch.Tensor) -> Iterator[None]:
    """Read ``x`` on the CPU by one thread, unless it is large: waking another takes longer than reading."""
    threads = torch.get_num_threads() if x.device.type == "cpu" and x.numel() <= ALONE else 1
    if threads > 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if threads > 1:
            torch.set_num_threads(threads)


class _MeanSum:
    """Σ over calls of a call's mean: a call brings sums, whose division and float64 addition wait for others.

    At most ``FOLD`` calls wait, all of the same number of values; each is two tensors of one shape and dtype.
    """

    def __init__(self) -> None:
        self._waiting: list[torch.Tensor] = []
        self._count = 0
        self._total: torch.Tensor | None = None  # [2, *shape]

    def add(self, first: torch.Tensor, second: torch.Tensor, count: int) -> None:
        """Sums over ``count`` values, float32 of any shape."""
        if count != self._count or len(self._waiting) == 2 * FOLD:
            self._fold()
            self._count = count
        self._waiting += (first, second)

    def drain(self) -> torch.Tensor | None:
        """Both sums of means [2, *shape], float64 on the CPU; None where nothing was added. Starts anew."""
        self._fold()
        total, self._total = self._total, None
        return None if total is None else total.to("cpu", torch.float64)

    def _fold(self) -> None:
        if not self._waiting:
            return
        calls = torch.stack(self._waiting).unflatten(0, (-1, 2))
        means = calls.sum(0, dtype=_sum_dtype(calls.device)) / self._count
        self._total = means if self._total is None else self._total + means
        self._waiting.clear()


class LayerObserver:
    """Accumulates ``LayerStats`` from the inputs and outputs of one layer.

    Args:
        name: the layer's name, for errors.
        kind: "Linear" or "Conv2d".
        shape: weight shape.
        channels: C_in of the input (in_features, in_channels).
    """

    def __init__(self, name: str, kind: str, shape: tuple[int, ...], channels: int) -> None:
        self.name, self.kind, self.shape, self.channels = name, kind, shape, channels
        self._in_calls = 0
        self._out_calls = 0
        self._inputs = _MeanSum()  # of |x_c| and x_c
        self._outputs = _MeanSum()  # of y and y²
        self._peaks: list[torch.Tensor] = []  # max|x| of calls, [] each

    def see_input(self, x: torch.Tensor) -> None:
        """Add one call's input: any floating dtype, rank 2-4, channels on ``channel_axis``."""
        axis = channel_axis(self.kind, x.dim(), self.name)
        if x.shape[axis] != self.channels:
            raise LayerError(
                f"Layer {self.name} ({self.kind}), input channels",
                got=x.shape[axis],
                expected=self.channels,
                remedy="The observed module is not the layer it is taken for; please report it with the model's name.",
            )
        if x.numel() == 0:
            return
        others = [d for d in range(x.dim()) if d != axis]
        # Nothing is fetched here: hundreds of layers would wait for the device, hundreds of times a picture.
        # Not vector_norm: on the CPU its float32 sums drift by a per cent over a million rows, and it is slower.
        with _one_thread(x):
            magnitude = x.abs()
            peak = magnitude.amax()
            absolute, plain = magnitude.sum(others, dtype=torch.float32), x.sum(others, dtype=torch.float32)
        self._inputs.add(absolute, plain, x.numel() // self.channels)
        self._peaks = [torch.stack(self._peaks).amax()] if len(self._peaks) == FOLD else self._peaks
        self._peaks.append(peak)
        self._in_calls += 1

    def see_output(self, y: torch.Tensor) -> None:
        """Add one call's output: any floating dtype and shape."""
        if y.numel() == 0:
            return
        # Rows first: one float32 norm over millions of values drifts by per cents. The 16 values of an image's row are
        # too few again: they take three times as long as the same values in long rows.
        rows = y.flatten(-2) if y.dim() > 2 and y.shape[-2:].numel() <= NORM_ROW else y
        with _one_thread(y):
            norms = torch.linalg.vector_norm(rows, 2, dim=-1, dtype=torch.promote_types(y.dtype, torch.float32))
            total, squares = y.sum(dtype=torch.float32), norms.square().sum(dtype=torch.float32)
        self._outputs.add(total, squares, y.numel())
        self._out_calls += 1

    def drain(self) -> LayerStats:
        """Fetch the sums to the CPU and start anew."""
        stats = LayerStats.empty(self.kind, self.shape, self.channels)
        stats.in_calls, stats.out_calls = self._in_calls, self._out_calls
        inputs, outputs = self._inputs.drain(), self._outputs.drain()
        if inputs is not None:
            stats.abs_sum, stats.mean_sum = inputs
            stats.input_amax = torch.stack(self._peaks).amax().item()
        if outputs is not None:
            stats.out_sum, stats.out_sq_sum = outputs.tolist()
        self._in_calls = self._out_calls = 0
        self._peaks.clear()
        return stats


def _sum_dtype(device: torch.device) -> torch.dtype:
    """float64, except on Apple's MPS, which has none (its sums live from one save to the next only)."""
    return torch.float32 if device.type == "mps" else torch.float64
