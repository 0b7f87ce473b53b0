"""Capabilities of torch devices."""

from __future__ import annotations

import torch

CPU = torch.device("cpu")


def has_float64(device: torch.device) -> bool:
    """Whether ``device`` supports float64; Apple's MPS does not."""
    return device.type != "mps"
