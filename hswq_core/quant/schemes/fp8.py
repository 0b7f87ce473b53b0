"""FP8 e4m3fn: scaled per tensor, per output channel, or not at all."""

from __future__ import annotations

import torch

from ..grid import FLOAT8_E4M3FN
from .scheme import CHANNEL, Scheme, Steps


class Fp8(Scheme):
    """codes · scale, scale = amax / 448 for the whole tensor."""

    name = "fp8"
    number_format = FLOAT8_E4M3FN.name
    dtype = FLOAT8_E4M3FN.dtype
    plain_limit = FLOAT8_E4M3FN.max
    stock_since = "0.18.2"

    def limited(self, limit: float | torch.Tensor) -> Steps:
        """See ``Grid.scale``."""
        return Steps(FLOAT8_E4M3FN.scale(limit))

    def cast(self, x: torch.Tensor) -> torch.Tensor:
        """See ``Grid.cast``."""
        return FLOAT8_E4M3FN.cast(x)

    def widen(self, codes: torch.Tensor) -> torch.Tensor:
        """Exact."""
        return FLOAT8_E4M3FN.dequantize(codes, None)

    def activations(self, x: torch.Tensor, amax: float) -> torch.Tensor:
        """Rounded to FP8 with scale amax / 448, as ComfyUI does for FP8 matmuls."""
        return self.rounded(x, self.at(amax, x.device)).to(x.dtype)


class Fp8Channel(Fp8):
    """One scale per output channel; only HSWQ Loader reads it."""

    name = "fp8_channel"
    granularity = CHANNEL
    stock_since = ""


class Fp8Cast(Fp8):
    """No scale: clip at amax, then cast. The grid does not move, so a small amax gains no resolution."""

    name = "fp8_cast"
    scaled = False
    judged_against = Fp8.name

    def limited(self, limit: float | torch.Tensor) -> Steps:
        """Steps of 1."""
        clip = torch.as_tensor(limit, dtype=torch.float32)
        return Steps(torch.ones((), device=clip.device), clip)
