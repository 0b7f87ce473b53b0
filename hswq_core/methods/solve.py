"""Codes for one layer: compensated if that wins on held-out inputs, else rounded to nearest."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..model.layer import Layer
from ..quant.cholesky import Tick
from ..quant.gptq import DAMPING, compensated, never_cancelled
from ..quant.moments import Moments, Rows, over_all_inputs
from ..quant.schemes.scheme import CODES, SCALE, Scheme, Tensors
from ..quant.schemes.table import scheme_named
from .decide import require_finite

# Damping grows with columns per row: a layer that saw few rows (time and label embeddings see one per picture) is
# almost rounded to nearest. On the Flux-layout reference model with 128 states, 0.05 gives 0.3 to 0.5 dB less error
# than 0.2, both in calls and in pictures.
DAMPING_PER_COLUMN = 0.05
NEAREST, COMPENSATED, UNSOLVED = "nearest", "compensated", "nearest for want of memory"


@dataclass(frozen=True)
class Solution:
    """A quantized layer.

    Attributes:
        scheme: name of its scheme.
        tensors: its stored tensors, see ``Scheme.tensors``.
        how: "nearest", "compensated", "learned" or "nearest for want of memory".
        bias: correction to add to the layer's bias, float32 [out], or None.
        error, nearest_error: mean squared change of the outputs, relative to their mean square: on held-out inputs, on
            those that method learned models, or, when out of memory, the same of the weight itself.
        damping: used by compensation, relative to the mean diagonal of G; 0 if it was not tried.
        dead: number of columns whose input is always zero.
    """

    scheme: str
    tensors: Tensors
    how: str
    bias: torch.Tensor | None
    error: float
    nearest_error: float
    damping: float = 0.0
    dead: int = 0

    @property
    def codes(self) -> torch.Tensor:
        """The stored codes."""
        return self.tensors[CODES]

    @property
    def scale(self) -> torch.Tensor | None:
        """float32 multiplier at dequantize, [] or per channel [out, 1, ...]; None if the scheme has none."""
        return self.tensors.get(SCALE)

    def to(self, device: torch.device) -> Solution:
        """The same on another device."""
        tensors = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        return replace(self, tensors=tensors, bias=None if self.bias is None else self.bias.to(device))

    def restored(self, device: torch.device) -> torch.Tensor:
        """The dequantized weight, float32."""
        return scheme_named(self.scheme).restored({name: tensor.to(device) for name, tensor in self.tensors.items()})


def solve(
    layer: Layer,
    w: torch.Tensor,
    fit: Moments,
    held: Moments | Rows,
    *,
    scheme: Scheme,
    has_bias: bool,
    tick: Tick = never_cancelled,
) -> Solution:
    """Round one layer.

    Works in units of the scale: rows of a weight are independent, so each may have its own scale.

    Args:
        w: its weight, on the same device as the moments.
        fit: moments of the inputs to round for.
        held: held-out inputs, to decide by.
        scheme: how to store it.
        has_bias: whether the layer has a bias that can take a correction.
        tick: called about once per second of work; may raise to cancel.

    Raises:
        LayerError: a weight with NaN or infinity.
    """
    require_finite(layer, w)
    w = w.to(torch.float32)
    steps = scheme.steps(w)
    signal = max(held.error(w), torch.finfo(torch.float32).tiny)
    damping = max(DAMPING, DAMPING_PER_COLUMN * len(fit.gram) / fit.rows)
    values = scheme.into(w, steps)
    nearest = scheme.nearest(values)
    candidates, used, dead = {NEAREST: nearest}, 0.0, 0
    if w[0].numel() == len(fit.gram):  # not for grouped convolutions
        rounding = compensated(values, fit.gram, scheme.nearest, damping=damping, tick=tick)
        candidates[COMPENSATED] = _pinned(rounding.weight, values, nearest, steps.unit)
        used, dead = rounding.damping, rounding.dead
    errors = {how: held.error(rounded * steps.unit - w) / signal for how, rounded in candidates.items()}
    how = min(errors, key=lambda name: errors[name])
    chosen = candidates[how]
    bias = bias_correction(chosen * steps.unit - w, fit, held) if has_bias else None
    tensors = scheme.tensors(scheme.cast(chosen), steps)
    return Solution(scheme.name, tensors, how, bias, errors[how], errors[NEAREST], used, dead)


def unsolved(layer: Layer, w: torch.Tensor, scheme: Scheme) -> Solution:
    """Fall back to nearest codes when out of memory for the layer's inputs; errors are those of its weight.

    Raises:
        LayerError: a weight with NaN or infinity.
    """
    require_finite(layer, w)
    w = w.to(torch.float32)
    tensors = scheme.nearest_tensors(w)
    signal = max(float(w.square().sum(dtype=torch.float64)), torch.finfo(torch.float32).tiny)
    error = float((scheme.restored(tensors) - w).square().sum(dtype=torch.float64)) / signal
    return Solution(scheme.name, tensors, UNSOLVED, None, error, error)


def bias_correction(delta: torch.Tensor, fit: Moments, held: Moments | Rows) -> torch.Tensor | None:
    """Correction for the mean change of the outputs, -Δ E[x]; None if it does not reduce the error on held-out inputs.

    With a correction c the mean squared change is tr(Δ G Δᵀ) + 2 c · Δ E[x] + |c|².
    """
    rows = over_all_inputs(delta.reshape(len(delta), -1), len(fit.mean))
    correction = -(rows @ fit.mean)
    gain = 2 * (correction @ (rows @ held.mean)) + correction @ correction
    return correction if gain.item() < 0 else None


def _pinned(rounded: torch.Tensor, w: torch.Tensor, nearest: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    """Give the largest weight of each scale its nearest code, the end of the grid.

    ComfyUI remeasures the scale when it requantizes small or patched layers; this way it arrives at the same one.
    """
    parts = (unit.numel(), -1)
    top = w.abs().reshape(parts).argmax(1, keepdim=True)
    return rounded.reshape(parts).scatter(1, top, nearest.reshape(parts).gather(1, top)).reshape(w.shape)
