"""Error measures for tensors. Pictures are measured in figures/scores.py."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from .grid import pieces


def relative_error(reference: torch.Tensor, approximation: torch.Tensor) -> float:
    """‖x − x̂‖₂ / ‖x‖₂ in float64; 0 for two zero tensors, inf for any error on a zero reference."""
    return relative_error_of(zip(pieces(reference), pieces(approximation), strict=True))


def relative_error_of(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """``relative_error`` of tensors given in pieces, each a pair (reference, approximation)."""
    noise = signal = 0.0
    for reference, approximation in pairs:
        exact = reference.to(torch.float64)
        signal += torch.sum(exact * exact).item()
        noise += torch.sum((exact - approximation).square_()).item()
    if signal == 0.0:
        return 0.0 if noise == 0.0 else math.inf
    return math.sqrt(noise / signal)


def sqnr_db(reference: torch.Tensor, approximation: torch.Tensor) -> float:
    """Signal-to-quantization-noise ratio, 20·log10(‖x‖/‖x − x̂‖) in dB; inf when equal."""
    return error_to_db(relative_error(reference, approximation))


def error_to_db(relative: float) -> float:
    """A relative error in dB: −20·log10(e)."""
    return math.inf if relative == 0.0 else -20.0 * math.log10(relative)


def weighted_square_sum(
    reference: torch.Tensor, approximation: torch.Tensor, importance: torch.Tensor | None
) -> torch.Tensor:
    """Σ I·(x̂−x)² as float64 []; ``importance`` broadcasts over ``reference`` (None: 1 everywhere)."""
    squared = (approximation.to(torch.float32) - reference.to(torch.float32)).square_()
    if importance is not None:
        squared.mul_(importance)
    return squared.sum(dtype=torch.float64)
