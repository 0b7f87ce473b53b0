"""What torch's devices have and lack."""

from __future__ import annotations

import torch

CPU = torch.device("cpu")


def has_float64(device: torch.device) -> bool:
    """Whether ``device`` computes in float64; Apple's MPS does not."""
    return device.type != "mps"
