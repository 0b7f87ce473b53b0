"""The FP8 grid: codes, cast, scale rule. The only float8 cast in the project.

``scale`` always means the float32 multiplier **at dequantize**.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Weights processed at a time on the CPU, so that intermediates stay in cache: four times as fast as whole layers
# (measured on 13 million weights; 2^17 to 2^20 perform alike).
PIECE = 2**18

# Below this many codes torch's own conversion is faster than six operator calls.
WIDEN_LEAST = 2**14


@dataclass(frozen=True)
class Grid:
    """A signed, zero-symmetric 8-bit floating grid.

    Attributes:
        name: the format's name in files (``comfy_quant`` JSON) and reports.
        dtype: the torch storage dtype.
        max: largest finite value.
        max_code: its code.
        nan_code: code of NaN, ignoring the sign.
    """

    name: str
    dtype: torch.dtype
    max: float
    max_code: int
    nan_code: int

    def values(self) -> torch.Tensor:
        """All distinct finite values, float32, ascending, shape [n] (both zeros count once)."""
        codes = torch.arange(256, dtype=torch.uint8).view(self.dtype).to(torch.float32)
        return codes[codes.isfinite()].unique(sorted=True)

    def scale(self, amax: float | torch.Tensor) -> torch.Tensor:
        """float32 scale that maps ``amax`` to the largest code: amax / max.

        An all-zero tensor (amax 0) gets scale 1, so that 0 / scale is 0 instead of NaN.
        For the same reason the scale is at least the smallest normal float32.
        """
        scale = torch.as_tensor(amax, dtype=torch.float32) / self.max
        tiny = torch.finfo(torch.float32).tiny
        return torch.where(scale > 0, scale.clamp(min=tiny), torch.ones_like(scale))

    def cast(self, x: torch.Tensor) -> torch.Tensor:
        """Round to the nearest code, ties to even, saturating at ±max (a bare cast would give NaN)."""
        return x.clamp(-self.max, self.max).to(self.dtype)

    def dequantize(
        self, codes: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """codes · scale, multiplied in float32 and rounded once to ``dtype``."""
        if codes.device.type == "cpu":
            w = _widened(codes)
            return (w if scale is None else w.mul_(scale)).to(dtype)
        w = codes.to(dtype)  # exact in every 16-bit type
        # One kernel that multiplies in float32 for any dtype; a rank-0 scale would first be rounded to that dtype.
        return w if scale is None else torch.mul(w, scale.reshape(scale.shape or (1,)), out=w)

    def largest_code(self, codes: torch.Tensor) -> int:
        """The largest code, ignoring signs; ``nan_code`` if there is a NaN, 0 for no codes."""
        return int((codes.view(torch.uint8) & self.nan_code).amax()) if codes.numel() else 0

    def nearest(self, x: torch.Tensor) -> torch.Tensor:
        """The nearest value on the grid, float32; see ``cast``."""
        return self.dequantize(self.cast(x), None)


def pieces(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """``x`` in flat pieces of ``PIECE`` on the CPU, in one piece on a GPU."""
    flat = x.flatten()
    return flat.split(PIECE) if x.device.type == "cpu" else (flat,)


def by_channel(values: torch.Tensor, rank: int) -> torch.Tensor:
    """A single value as [], per-channel values as [out, 1, ...]: broadcasts over a weight of ``rank``."""
    return values.reshape((-1, *[1] * (rank - 1)) if values.numel() > 1 else ())


def _widened(codes: torch.Tensor) -> torch.Tensor:
    """8-bit codes as float32 on the CPU, where torch's own conversion of float8_e4m3fn takes five times as long.

    Shifted up seven bits, sign, exponent and mantissa line up with float16, whose exponents start 8 lower. NaN codes
    would become 480, so tensors with NaN are left to torch, and so are other formats.
    """
    if codes.dtype != torch.float8_e4m3fn or codes.numel() < WIDEN_LEAST:
        return codes.to(torch.float32)
    if FLOAT8_E4M3FN.largest_code(codes) == FLOAT8_E4M3FN.nan_code:
        return codes.to(torch.float32)
    bits = codes.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~0x4000)
    return bits.view(torch.float16).to(torch.float32).mul_(2.0**8)


FLOAT8_E4M3FN = Grid("float8_e4m3fn", torch.float8_e4m3fn, 448.0, max_code=0x7E, nan_code=0x7F)
FLOAT8_DTYPES = frozenset(
    dtype
    for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu")
    if (dtype := getattr(torch, name, None)) is not None
)


def largest_of_channels(w: torch.Tensor) -> torch.Tensor:
    """max|w| of each output channel of [out, ...], float32 [out, 1, ...]."""
    return w.abs().flatten(1).amax(1).to(torch.float32).reshape(-1, *[1] * (w.dim() - 1))


def largest(w: torch.Tensor) -> float:
    """max|w| without copying ``w``; NaN if ``w`` contains one."""
    low, high = torch.aminmax(w)
    return max(-low.item(), high.item())
