"""One layer's codes: compensated where that wins on inputs the solver has not seen, nearest where it does not."""

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

# Damping grows with columns per row: a layer that saw few rows (time and label embeddings see one a picture) is
# rounded nearly to nearest. On the Flux-layout reference model, 128 states, 0.05 leaves 0.3 to 0.5 dB less error than
# 0.2, of calls and of pictures.
DAMPING_PER_COLUMN = 0.05
NEAREST, COMPENSATED, UNSOLVED = "nearest", "compensated", "nearest for want of memory"


@dataclass(frozen=True)
class Solution:
    """A quantized layer.

    Attributes:
        scheme: name of the scheme it is stored by.
        tensors: what a file holds of it, see ``Scheme.tensors``.
        how: "nearest", "compensated", "learned" or "nearest for want of memory".
        bias: what to add to the layer's bias, float32 [out], or None.
        error, nearest_error: mean squared change of the outputs, relative to their mean square: for unseen
            inputs, for those that method learned supposes, or for want of memory those of the weight itself.
        damping: that compensation needed, as a share of the mean diagonal of G; 0 where it was not tried.
        dead: columns that no input ever reached.
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
        """As they are stored."""
        return self.tensors[CODES]

    @property
    def scale(self) -> torch.Tensor | None:
        """float32 multiplier at dequantize, [] or a channel's [out, 1, ...]; None where the scheme has none."""
        return self.tensors.get(SCALE)

    def to(self, device: torch.device) -> Solution:
        """The same on another device."""
        tensors = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        return replace(self, tensors=tensors, bias=None if self.bias is None else self.bias.to(device))

    def restored(self, device: torch.device) -> torch.Tensor:
        """What a loader makes of it, float32."""
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

    In units of the scale: rows of a weight do not know of each other, so that each may have its own.

    Args:
        w: its weight, any device; the moments on the same.
        fit: of the inputs to round by.
        held: other inputs, to decide by.
        scheme: to store it by.
        has_bias: whether the layer has a bias that a correction can go to.
        tick: called every second or so of work; may raise to cancel.

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
    if w[0].numel() == len(fit.gram):  # not so for a grouped convolution
        found = compensated(values, fit.gram, scheme.nearest, damping=damping, tick=tick)
        candidates[COMPENSATED] = _pinned(found.weight, values, nearest, steps.unit)
        used, dead = found.damping, found.dead
    errors = {how: held.error(rounded * steps.unit - w) / signal for how, rounded in candidates.items()}
    how = min(errors, key=lambda name: errors[name])
    chosen = candidates[how]
    bias = bias_correction(chosen * steps.unit - w, fit, held) if has_bias else None
    tensors = scheme.tensors(scheme.cast(chosen), steps)
    return Solution(scheme.name, tensors, how, bias, errors[how], errors[NEAREST], used, dead)


def unsolved(layer: Layer, w: torch.Tensor, scheme: Scheme) -> Solution:
    """Nearest codes, where there is no memory for the layer's inputs: errors are those of its weight.

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
    """What cancels the mean change of the outputs, -Δ E[x]; None where that does not lessen the error of unseen inputs.

    With a correction c the mean squared change is tr(Δ G Δᵀ) + 2 c · Δ E[x] + |c|².
    """
    rows = over_all_inputs(delta.reshape(len(delta), -1), len(fit.mean))
    correction = -(rows @ fit.mean)
    gain = 2 * (correction @ (rows @ held.mean)) + correction @ correction
    return correction if gain.item() < 0 else None


def _pinned(rounded: torch.Tensor, w: torch.Tensor, nearest: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    """The largest weight that a scale serves keeps its nearest code, the grid's end.

    ComfyUI requantizes small layers, and patched ones, with a scale it measures anew: so it measures the same.
    """
    parts = (unit.numel(), -1)
    top = w.abs().reshape(parts).argmax(1, keepdim=True)
    return rounded.reshape(parts).scatter(1, top, nearest.reshape(parts).gather(1, top)).reshape(w.shape)
