"""A layer of a model, and the keys of its tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

WEIGHT, BIAS = ".weight", ".bias"


def weight_key(layer: str, prefix: str = "") -> str:
    """Key of a layer's weight in a file or state dict where the diffusion model's keys start with ``prefix``."""
    return f"{prefix}{layer}{WEIGHT}"


def bias_key(layer: str, prefix: str = "") -> str:
    """Key of its bias, if it has one; see ``weight_key``."""
    return f"{prefix}{layer}{BIAS}"


def layer_of(key: str, prefix: str = "") -> str | None:
    """The layer whose weight has this key; None for any other key."""
    is_weight = key.startswith(prefix) and key.endswith(WEIGHT)
    return key[len(prefix) : -len(WEIGHT)] if is_weight else None


@dataclass(frozen=True)
class Layer:
    """One layer of the source.

    Attributes:
        name: layer name inside the diffusion model.
        kind: a row of ``KINDS``.
        shape: weight shape.
        dtype: dtype of the weight in the source.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def weights(self) -> int:
        """Number of weight elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the weight in the source."""
        return self.weights * self.dtype.itemsize
