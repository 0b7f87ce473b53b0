"""Statistics of one layer, accumulated while the model runs.

Sums are kept on the device of the activations in float64 (float32 where the device has no float64) and
fetched only by ``drain``, so that no layer or call synchronizes the device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..devices import has_float64
from ..errors import LayerError
from ..model.kinds import KINDS

# Longest row for one float32 norm; over constant values, longer rows drift by more than 1e-5.
NORM_ROW = 4096
GOLDEN = (math.sqrt(5) - 1) / 2


def is_measured(number: int, every: int) -> bool:
    """Whether to measure call ``number`` (from 0, always measured) if one in ``every`` is measured on average (1: all).

    Calls come in patterns: steps of a run, and, when memory is short, alternating positive and negative prompts.
    Measuring strictly every n-th call could lock onto such a pattern and see some of its members always and others
    never. The fractional parts of multiples of the golden ratio are spread evenly over any stretch of calls, and also
    over every n-th call of it (Weyl's equidistribution theorem).
    """
    return number * GOLDEN % 1.0 < 1 / every


@dataclass
class LayerStats:
    """Sums over one layer's calls, on the CPU.

    Attributes:
        kind: a row of ``KINDS``.
        shape: weight shape, [out, in] or [out, in / groups, kh, kw].
        in_calls, out_calls: forwards whose input or output was seen (may differ by one after an interrupt).
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
        """Statistics before the first call; ``channels`` = C_in of the layer's input."""
        zeros = torch.zeros(channels, dtype=torch.float64)
        return cls(kind, shape, 0, 0, 0.0, 0.0, zeros, zeros.clone(), 0.0)

    def merge(self, other: LayerStats) -> None:
        """Add statistics from another part of the session; exact up to float64 addition."""
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
    def level(self) -> float:
        """Mean |input| over channels and calls; 0 for a layer never called."""
        return self.abs_sum.sum().item() / (len(self.abs_sum) * max(self.in_calls, 1))

    @property
    def input_mean(self) -> torch.Tensor:
        """E[x_c], float64 [C_in]."""
        return self.mean_sum / max(self.in_calls, 1)

    def is_finite(self) -> bool:
        """False once a NaN or infinity has entered any sum."""
        channels = (self.abs_sum + self.mean_sum).sum().item()  # non-finite values propagate
        return math.isfinite(self.out_sum + self.out_sq_sum + self.input_amax + channels)


class InputSums(NamedTuple):
    """Measurements of one call's input.

    Attributes:
        absolute, plain: Σ|x_c| and Σ x_c, float32 [C_in].
        peak: max|x|, [].
        share: 1 / number of values per channel.
    """

    absolute: torch.Tensor
    plain: torch.Tensor
    peak: torch.Tensor
    share: float

    @classmethod
    def of(cls, x: torch.Tensor, axis: int) -> InputSums:
        """Measure ``x``, whose channels are on ``axis``, without fetching anything from its device."""
        # Reduce pixels or tokens first, in memory order. Not vector_norm: it is slower, and on the CPU its float32 sums
        # drift by a percent over a million rows.
        last = axis == x.dim() - 1
        values, over = (x.flatten(0, -2), 0) if last else (x.flatten(-2), -1)
        magnitude = values.abs()
        absolute, plain = magnitude.sum(over, dtype=torch.float32), values.sum(over, dtype=torch.float32)
        if absolute.dim() == 2:  # one row per image of a convolution
            absolute, plain = absolute.sum(0), plain.sum(0)
        return cls(absolute, plain, magnitude.amax(), absolute.numel() / x.numel())


class LastInput:
    """Caches the last measured input: layers that share one (to_q, to_k, to_v) run back to back.

    Keeps that tensor alive until another input is measured, or ``clear``. Tensors created in inference mode have no
    version counter: one modified in place between two consecutive layers is taken to be unchanged.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Drop the cached tensor."""
        self._seen: tuple[torch.Tensor, int | None, int, InputSums] | None = None

    def measured(self, x: torch.Tensor, axis: int) -> InputSums:
        """The sums of ``x``, from the cache if it is the same, unmodified tensor."""
        version = None if x.is_inference() else x._version
        if self._seen is None or self._seen[0] is not x or self._seen[1:3] != (version, axis):
            self._seen = (x, version, axis, InputSums.of(x, axis))
        return self._seen[3]


class LayerObserver:
    """Accumulates ``LayerStats`` from the inputs and outputs of one layer.

    Args:
        name: the layer's name, for errors.
        kind: a row of ``KINDS``.
        shape: weight shape.
        channels: C_in of the input (in_features, in_channels).
        last: cache shared by all layers that may share an input; None: no cache.
    """

    def __init__(
        self, name: str, kind: str, shape: tuple[int, ...], channels: int, last: LastInput | None = None
    ) -> None:
        self.name, self.kind, self.shape, self.channels = name, kind, shape, channels
        self._last = last
        self._in_calls = 0
        self._out_calls = 0
        self._inputs: tuple[torch.Tensor, ...] | None = None  # Σ mean|x_c| and Σ mean x_c [C_in], max|x| []
        self._outputs: tuple[torch.Tensor, ...] | None = None  # Σ mean(y), Σ mean(y²), [] each

    def see_input(self, x: torch.Tensor) -> None:
        """Add one call's input: any floating dtype; ranks and channel axis as given by the kind."""
        axis = KINDS[self.kind].channel_axis(x.dim(), self.name)
        if x.shape[axis] != self.channels:
            raise LayerError(
                f"Layer {self.name} ({self.kind}), input channels",
                got=x.shape[axis],
                expected=self.channels,
                remedy="The observed module is not the layer it is taken for; please report it with the model's name.",
            )
        if x.numel() == 0:
            return
        seen = InputSums.of(x, axis) if self._last is None else self._last.measured(x, axis)
        if self._inputs is None:
            zeros = torch.zeros(self.channels, dtype=_sum_dtype(x.device), device=x.device)
            self._inputs = zeros, zeros, torch.zeros((), device=x.device)
        absolute, plain, peak = self._inputs
        # Not in place: sums made under inference mode cannot be updated in place outside of it.
        self._inputs = (
            torch.add(absolute, seen.absolute, alpha=seen.share),
            torch.add(plain, seen.plain, alpha=seen.share),
            torch.maximum(peak, seen.peak),
        )
        self._in_calls += 1

    def see_output(self, y: torch.Tensor) -> None:
        """Add one call's output: any floating dtype and shape."""
        if y.numel() == 0:
            return
        dtype, share = _sum_dtype(y.device), 1 / y.numel()
        # Row norms first: one float32 norm over millions of values drifts by several percent. But an image's rows of 16
        # values are too short: they take three times as long as the same values in long rows.
        rows = y.flatten(-2) if y.dim() > 2 and y.shape[-2:].numel() <= NORM_ROW else y
        norms = torch.linalg.vector_norm(rows, 2, dim=-1, dtype=torch.promote_types(y.dtype, torch.float32))
        norm = torch.linalg.vector_norm(norms, dtype=dtype)
        if self._outputs is None:
            zero = torch.zeros((), dtype=dtype, device=y.device)
            self._outputs = zero, zero
        total, squares = self._outputs
        self._outputs = (
            torch.add(total, y.sum(dtype=torch.float32), alpha=share),
            torch.addcmul(squares, norm, norm, value=share),
        )
        self._out_calls += 1

    def drain(self) -> LayerStats:
        """Fetch the sums to the CPU and reset."""
        stats = LayerStats.empty(self.kind, self.shape, self.channels)
        stats.in_calls, stats.out_calls = self._in_calls, self._out_calls
        if self._inputs is not None:
            absolute, plain, peak = self._inputs
            stats.abs_sum, stats.mean_sum = absolute.to("cpu", torch.float64), plain.to("cpu", torch.float64)
            stats.input_amax = peak.item()
        if self._outputs is not None:
            stats.out_sum, stats.out_sq_sum = torch.stack(self._outputs).tolist()
        self._in_calls = self._out_calls = 0
        self._inputs = self._outputs = None
        return stats


def _sum_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 where unsupported (those sums only last from one save to the next)."""
    return torch.float64 if has_float64(device) else torch.float32
