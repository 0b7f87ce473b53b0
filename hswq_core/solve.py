"""One layer's codes: compensated where that wins on inputs the solver has not seen, nearest where it does not."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .compensate import DAMPING, compensated
from .gram import Moments, output_error, over_all_inputs
from .grid import Grid
from .plan import Layer
from .rounding import finite_weight
from .search import largest

# Damping grows with columns per row: a layer that saw few rows (time and label embeddings see one a picture) is
# rounded nearly to nearest. Of 0.05, 0.2 and 1 the best or nearly so on the Flux-layout reference model, half
# trained, at 24 to 96 states.
DAMPING_PER_COLUMN = 0.05
NEAREST, COMPENSATED = "nearest", "compensated"


@dataclass(frozen=True)
class Solution:
    """A layer in 8 bits.

    Attributes:
        codes: in the weight's shape.
        amax: clip limit; the scale, if there is one, is amax / max.
        scaled: whether it has a scale.
        how: "nearest" or "compensated".
        bias: what to add to the layer's bias, float32 [out], or None.
        error, nearest_error: mean squared change of the outputs for unseen inputs, relative to their mean square.
        damping: that compensation needed, as a share of the mean diagonal of G; 0 where it was not tried.
        dead: columns that no input ever reached.
    """

    codes: torch.Tensor
    amax: float
    scaled: bool
    how: str
    bias: torch.Tensor | None
    error: float
    nearest_error: float
    damping: float = 0.0
    dead: int = 0

    def restored(self, grid: Grid, device: torch.device) -> torch.Tensor:
        """What a loader makes of the codes, float32."""
        scale = grid.scale(self.amax).to(device) if self.scaled else None
        return grid.dequantize(self.codes.to(device), scale)


def solve(
    layer: Layer, w: torch.Tensor, fit: Moments, held: Moments, *, scaled: bool, grid: Grid, has_bias: bool
) -> Solution:
    """Round one layer.

    Args:
        w: its weight, any device; the moments on the same.
        fit: of the inputs to round by.
        held: of other inputs, to decide by.
        has_bias: whether the layer has a bias that a correction can go to.

    Raises:
        LayerError: a weight with NaN or infinity.
    """
    w = finite_weight(layer, w)
    amax = largest(w) if scaled else grid.max
    cast = grid.rounding(amax, scaled=scaled, device=w.device)
    signal = max(output_error(w, held.gram), torch.finfo(torch.float32).tiny)
    damping = max(DAMPING, DAMPING_PER_COLUMN * len(fit.gram) / fit.rows)
    nearest = cast(w)
    candidates, used, dead = {NEAREST: nearest}, 0.0, 0
    if w[0].numel() == len(fit.gram):  # not so for a grouped convolution
        found = compensated(w, fit.gram, cast, damping=damping)
        candidates[COMPENSATED], used, dead = _pinned(found.weight, w, nearest), found.damping, found.dead
    errors = {how: output_error(rounded - w, held.gram) / signal for how, rounded in candidates.items()}
    how = min(errors, key=lambda name: errors[name])
    chosen = candidates[how]
    bias = bias_correction(chosen - w, fit, held) if has_bias else None
    codes, _ = grid.quantize(chosen, amax, scaled=scaled)
    return Solution(codes, amax, scaled, how, bias, errors[how], errors[NEAREST], used, dead)


def bias_correction(delta: torch.Tensor, fit: Moments, held: Moments) -> torch.Tensor | None:
    """What cancels the mean change of the outputs, -Δ E[x]; None where that does not lessen the error of unseen inputs.

    With a correction c the mean squared change is tr(Δ G Δᵀ) + 2 c · Δ E[x] + |c|².
    """
    rows = over_all_inputs(delta.reshape(len(delta), -1), len(fit.mean))
    correction = -(rows @ fit.mean)
    gain = 2 * (correction @ (rows @ held.mean)) + correction @ correction
    return correction if gain.item() < 0 else None


def _pinned(rounded: torch.Tensor, w: torch.Tensor, nearest: torch.Tensor) -> torch.Tensor:
    """The largest weight keeps its nearest code, the grid's end.

    ComfyUI requantizes small layers, and patched ones, with a scale it measures anew: so it measures the same.
    """
    flat = rounded.flatten()
    top = w.abs().flatten().argmax()
    flat[top] = nearest.flatten()[top]
    return flat.reshape(w.shape)
