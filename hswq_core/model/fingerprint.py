"""Identifies the model that statistics belong to, by layer names, shapes and a sample of its weights."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

from ..errors import SessionError

SAMPLES_PER_LAYER = 4
# A bfloat16 copy of a model differs by 0.11 % (uniform rounding, 2^-9/√3), a fine-tune by several percent.
SAME_WEIGHTS_TOLERANCE = 0.005


@dataclass(frozen=True)
class Fingerprint:
    """Identity of a model.

    Attributes:
        layout: sha256 (hex) over "name kind shape" of every Linear and Conv2d, sorted by name.
        weights: float32 [n_layers · 4]: four evenly spaced elements of every layer's flattened weight, layers sorted
            by name. A sample instead of a hash, because the same model loaded as float16, bfloat16 or float32 must
            match itself.
    """

    layout: str
    weights: torch.Tensor

    @property
    def short(self) -> str:
        """The first twelve hex digits, for headers and reports."""
        return self.layout[:12]

    def require_same(self, other: Fingerprint, what: str) -> None:
        """Raise SessionError unless ``other`` is the same model (layout equal, weights within 0.5 %)."""
        if self.layout != other.layout or self.weights.shape != other.weights.shape:
            raise SessionError(
                what,
                got=f"a model with another layer layout ({other.short})",
                expected=f"the model the session was made with ({self.short})",
                remedy="Use another session name for this model, or connect the model the session belongs to.",
            )
        distance = (torch.linalg.vector_norm(self.weights - other.weights) / _norm(self.weights)).item()
        if not distance <= SAME_WEIGHTS_TOLERANCE:  # also catches NaN
            raise SessionError(
                what,
                got=f"the same architecture with other weights ({distance:.1%} apart)",
                expected=f"the model the session was made with (within {SAME_WEIGHTS_TOLERANCE:.1%})",
                remedy="Use another session name for this model, or connect the model the session belongs to.",
            )


def _norm(x: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(x).clamp(min=torch.finfo(torch.float32).tiny)


def layout_hash(layers: Mapping[str, tuple[str, tuple[int, ...]]]) -> str:
    """sha256 of {name: (kind, weight shape)}, independent of order."""
    lines = sorted(f"{name} {kind} {'x'.join(map(str, shape))}" for name, (kind, shape) in layers.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def sample_weights(names: Iterable[str], read: Callable[[str], torch.Tensor]) -> torch.Tensor:
    """Four evenly spaced elements of every layer's weight as float32 [n·4]; ``read(name)`` returns the weight."""
    samples = []
    for name in sorted(names):
        flat = read(name).reshape(-1)
        # Integer arithmetic: float32 cannot index the 29 million weights of SDXL's largest convolution.
        last = flat.numel() - 1
        index = torch.tensor([i * last // (SAMPLES_PER_LAYER - 1) for i in range(SAMPLES_PER_LAYER)])
        samples.append(flat[index.to(flat.device)].to("cpu", torch.float32))
    return torch.cat(samples) if samples else torch.empty(0)
