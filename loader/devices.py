"""Where to compute, and how much memory there is: decided here for all of ``loader``."""

from __future__ import annotations

from collections.abc import Iterable

import comfy.model_management
import torch

from ..hswq_core.devices import CPU, has_float64
from ..hswq_core.model.layer import Layer

# float32 weight, its absolute values, bin numbers, importance (8 bytes), codes, error: counted in the code.
SEARCH_BYTES_PER_WEIGHT = 32
# Second moments, held-out inputs, factor and smaller buffers of a layer, as a multiple of its second moments.
SOLVER_COPIES = 3.5
BYTES_PER_NUMBER = 4  # float32


def model_device() -> torch.device:
    """Where ComfyUI runs models."""
    device: torch.device = comfy.model_management.get_torch_device()
    return device


def runs_on_cpu() -> bool:
    """Whether ComfyUI found no GPU."""
    return model_device().type == "cpu"


def search_device() -> torch.device:
    """Where clip search and rounding run: on the model's device, or the CPU if that one cannot sum in float64."""
    device = model_device()
    return device if has_float64(device) else CPU


def free_bytes(device: torch.device) -> float:
    """Memory that is free on a device now."""
    return float(comfy.model_management.get_free_memory(device))


def make_room(layers: list[Layer], device: torch.device) -> None:
    """Have ComfyUI unload models until the clip search of the largest layer fits on the GPU."""
    if device.type != "cpu":
        largest = max((layer.weights for layer in layers), default=0)
        comfy.model_management.free_memory(largest * SEARCH_BYTES_PER_WEIGHT, device)


def solver_bytes(columns: int) -> float:
    """Bytes that rounding a layer with this many columns by its inputs takes."""
    return SOLVER_COPIES * BYTES_PER_NUMBER * columns**2


def solver_room(columns: Iterable[int]) -> float:
    """``solver_bytes`` of the widest of these layers, but at most half the device's memory."""
    total = comfy.model_management.get_total_memory(model_device())
    return float(min(solver_bytes(max(columns)), total / 2))


def solver_device(columns: int, wanted: torch.device) -> torch.device:
    """Where to round a layer with this many columns: the CPU if ``wanted`` has no room for its moments and factor."""
    return wanted if wanted.type == "cpu" or solver_bytes(columns) < free_bytes(wanted) else CPU
