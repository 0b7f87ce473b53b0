"""Statistics of one layer, accumulated while the model runs.

Sums are kept on the device of the activations in float64 (float32 where the device has no float64) and
fetched only by ``drain``: no device synchronisation per layer and call.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .errors import LayerError

# Module kinds that are observed and quantized -> weight rank. By type name: ComfyUI's mixed-precision
# Linear is no subclass of torch.nn.Linear.
LAYER_KINDS = {"Linear": 2, "Conv2d": 4}


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
        scalars = torch.tensor([self.out_sum, self.out_sq_sum, self.input_amax], dtype=torch.float64)
        return all(bool(t.isfinite().all()) for t in (scalars, self.abs_sum, self.mean_sum))


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
        self._inputs: torch.Tensor | None = None  # [2, C_in] : Σ mean|x_c| ; Σ mean x_c
        self._amax: torch.Tensor | None = None  # []
        self._outputs: torch.Tensor | None = None  # [2]: Σ mean(y), Σ mean(y²)

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
        # Not vector_norm: on the CPU its float32 sums drift by a per cent over a million rows, and it is slower.
        magnitude = x.abs()
        absolute = magnitude.mean(dim=others, dtype=torch.float32)
        mean = x.mean(dim=others, dtype=torch.float32)
        amax = magnitude.amax().to(torch.float32)
        if self._inputs is None or self._amax is None:
            self._inputs = torch.zeros(2, self.channels, dtype=_sum_dtype(x.device), device=x.device)
            self._amax = torch.zeros((), dtype=torch.float32, device=x.device)
        self._inputs = self._inputs + torch.stack((absolute, mean))
        self._amax = torch.maximum(self._amax, amax)
        self._in_calls += 1

    def see_output(self, y: torch.Tensor) -> None:
        """Add one call's output: any floating dtype and shape."""
        if y.numel() == 0:
            return
        dtype = _sum_dtype(y.device)
        mean = y.mean(dtype=torch.float32).to(dtype)
        # Rows first, their squares summed in ``dtype``: one float32 norm over millions of values drifts by per cents.
        norms = torch.linalg.vector_norm(y, 2, dim=-1, dtype=torch.promote_types(y.dtype, torch.float32))
        mean_square = norms.to(dtype).square().sum() / y.numel()
        if self._outputs is None:
            self._outputs = torch.zeros(2, dtype=dtype, device=y.device)
        self._outputs = self._outputs + torch.stack((mean, mean_square))
        self._out_calls += 1

    def drain(self) -> LayerStats:
        """Fetch the sums to the CPU and start anew."""
        stats = LayerStats.empty(self.kind, self.shape, self.channels)
        stats.in_calls, stats.out_calls = self._in_calls, self._out_calls
        if self._inputs is not None and self._amax is not None:
            inputs = self._inputs.to("cpu", torch.float64)
            stats.abs_sum, stats.mean_sum = inputs[0].clone(), inputs[1].clone()
            stats.input_amax = self._amax.item()
        if self._outputs is not None:
            stats.out_sum, stats.out_sq_sum = self._outputs.to("cpu", torch.float64).tolist()
        self._in_calls = self._out_calls = 0
        self._inputs = self._amax = self._outputs = None
        return stats


def _sum_dtype(device: torch.device) -> torch.dtype:
    """float64, except on Apple's MPS, which has none (its sums live from one save to the next only)."""
    return torch.float32 if device.type == "mps" else torch.float64
