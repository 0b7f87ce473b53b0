"""One layer's codes: compensated where that wins on inputs the solver has not seen, nearest where it does not."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..model.layer import Layer
from ..plan.encoding import Encoding
from ..quant.cholesky import Tick
from ..quant.gptq import DAMPING, compensated, never_cancelled
from ..quant.grid import Grid
from ..quant.moments import Moments, Rows, over_all_inputs
from .decide import require_finite

# Damping grows with columns per row: a layer that saw few rows (time and label embeddings see one a picture) is
# rounded nearly to nearest. On the Flux-layout reference model, 128 states, 0.05 leaves 0.3 to 0.5 dB less error than
# 0.2, of calls and of pictures.
DAMPING_PER_COLUMN = 0.05
NEAREST, COMPENSATED, UNSOLVED = "nearest", "compensated", "nearest for want of memory"


@dataclass(frozen=True)
class Solution:
    """A layer in 8 bits.

    Attributes:
        codes: in the weight's shape.
        scale: float32 multiplier at dequantize, [] or a channel's [out, 1, ...]; None where the format has none.
        how: "nearest", "compensated", "learned" or "nearest for want of memory".
        bias: what to add to the layer's bias, float32 [out], or None.
        error, nearest_error: mean squared change of the outputs, relative to their mean square: for unseen
            inputs, for those that method learned supposes, or for want of memory those of the weight itself.
        damping: that compensation needed, as a share of the mean diagonal of G; 0 where it was not tried.
        dead: columns that no input ever reached.
    """

    codes: torch.Tensor
    scale: torch.Tensor | None
    how: str
    bias: torch.Tensor | None
    error: float
    nearest_error: float
    damping: float = 0.0
    dead: int = 0

    def to(self, device: torch.device) -> Solution:
        """The same on another device."""
        moved = {
            key: tensor.to(device) for key in ("codes", "scale", "bias") if (tensor := getattr(self, key)) is not None
        }
        return replace(self, **moved)

    def restored(self, grid: Grid, device: torch.device) -> torch.Tensor:
        """What a loader makes of the codes, float32."""
        return grid.dequantize(self.codes.to(device), None if self.scale is None else self.scale.to(device))


def solve(
    layer: Layer,
    w: torch.Tensor,
    fit: Moments,
    held: Moments | Rows,
    *,
    encoding: Encoding,
    has_bias: bool,
    tick: Tick = never_cancelled,
) -> Solution:
    """Round one layer.

    Args:
        w: its weight, any device; the moments on the same.
        fit: of the inputs to round by.
        held: other inputs, to decide by.
        has_bias: whether the layer has a bias that a correction can go to.
        tick: called every second or so of work; may raise to cancel.

    Raises:
        LayerError: a weight with NaN or infinity.
    """
    grid = encoding.grid
    w, scale, unit, scaled = _scaled(layer, w, encoding)
    signal = max(held.error(w), torch.finfo(torch.float32).tiny)
    damping = max(DAMPING, DAMPING_PER_COLUMN * len(fit.gram) / fit.rows)
    nearest = grid.nearest(scaled)
    candidates, used, dead = {NEAREST: nearest}, 0.0, 0
    if w[0].numel() == len(fit.gram):  # not so for a grouped convolution
        found = compensated(scaled, fit.gram, grid.nearest, damping=damping, tick=tick)
        candidates[COMPENSATED], used, dead = _pinned(found.weight, scaled, nearest, unit), found.damping, found.dead
    errors = {how: held.error(rounded * unit - w) / signal for how, rounded in candidates.items()}
    how = min(errors, key=lambda name: errors[name])
    chosen = candidates[how]
    bias = bias_correction(chosen * unit - w, fit, held) if has_bias else None
    return Solution(grid.cast(chosen), scale, how, bias, errors[how], errors[NEAREST], used, dead)


def unsolved(layer: Layer, w: torch.Tensor, encoding: Encoding) -> Solution:
    """Nearest codes, where there is no memory for the layer's inputs: errors are those of its weight.

    Raises:
        LayerError: a weight with NaN or infinity.
    """
    w, scale, unit, scaled = _scaled(layer, w, encoding)
    nearest = encoding.grid.nearest(scaled)
    signal = max(float(w.square().sum(dtype=torch.float64)), torch.finfo(torch.float32).tiny)
    error = float((nearest * unit - w).square().sum(dtype=torch.float64)) / signal
    return Solution(encoding.grid.cast(nearest), scale, UNSOLVED, None, error, error)


def _scaled(
    layer: Layer, w: torch.Tensor, encoding: Encoding
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """The weight in float32, its scale (None: it gets none), the unit it is rounded in, and the weight in that unit.

    In units of the scale: rows of a weight do not know of each other, so that each may have its own.
    """
    require_finite(layer, w)
    w = w.to(torch.float32)
    scale = encoding.scale(w, layer.kind)
    unit = torch.ones((), device=w.device) if scale is None else scale
    return w, scale, unit, w / unit


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
