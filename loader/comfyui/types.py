"""Names for annotations: ComfyUI's own classes where they say something, ours for what it leaves untyped.

Everything here is read by people and type checkers only: import it under TYPE_CHECKING.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import torch

if TYPE_CHECKING:
    from comfy.model_base import BaseModel
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import CLIP, VAE
    from comfy_kitchen.tensor import QuantizedTensor

    __all__ = ["CLIP", "VAE", "BaseModel", "ModelPatcher", "QuantizedTensor"]

# {key: tensor} of a file or a model.
StateDict: TypeAlias = dict[str, torch.Tensor]

# A change of one weight: (strength, value, strength of the weight itself, part of the weight or None, function or
# None). The value is an adapter, a tuple of a kind and tensors, or of another model's weight: no common type.
Patch: TypeAlias = tuple[float, Any, float, "tuple[int, ...] | None", "Callable[[torch.Tensor], torch.Tensor] | None"]

# What ``ModelPatcher.get_key_patches`` has for a key: (weight, function that makes it plain), then its patches. A list
# whose first item is of another kind than the rest cannot be typed.
KeyPatches: TypeAlias = list[Any]

# Changes a weight at each call; ``weight_function`` of a layer holds them.
WeightFunction: TypeAlias = Callable[[torch.Tensor], torch.Tensor]


class Guider(Protocol):
    """What runs the sampler."""

    model_patcher: ModelPatcher


class Sampled(Protocol):
    """What a sampler calls: the model around the diffusion model."""

    diffusion_model: torch.nn.Module


class SamplingExecutor(Protocol):
    """What an OUTER_SAMPLE wrapper gets: the rest of the sampling run."""

    class_obj: Guider

    def __call__(self, noise: torch.Tensor, latent: object, sampler: object, *args: object, **kwargs: object) -> object:
        """Run it."""


class ModelExecutor(Protocol):
    """What an APPLY_MODEL wrapper gets: the rest of the model call."""

    class_obj: Sampled

    def __call__(self, *args: object, **kwargs: object) -> object:
        """Run it."""
