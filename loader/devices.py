"""Where to compute: the one answer to which device, and how much room."""

from __future__ import annotations

import comfy.model_management
import torch

from ..hswq_core.model.layer import Layer

# float32 weight, its absolute values, bin numbers, importance (8 bytes), codes, error: counted in the code.
SEARCH_BYTES_PER_WEIGHT = 32


def search_device() -> torch.device:
    """The GPU, if there is one. Apple's MPS has no float64, which the search sums in: there the CPU searches."""
    device: torch.device = comfy.model_management.get_torch_device()
    return torch.device("cpu") if device.type == "mps" else device


def make_room(layers: list[Layer], device: torch.device) -> None:
    """Let ComfyUI unload models until the search of the largest layer fits on a GPU."""
    if device.type != "cpu":
        largest = max((layer.weights for layer in layers), default=0)
        comfy.model_management.free_memory(largest * SEARCH_BYTES_PER_WEIGHT, device)


def runs_on_cpu() -> bool:
    """Whether ComfyUI found no GPU."""
    return bool(comfy.model_management.get_torch_device().type == "cpu")
