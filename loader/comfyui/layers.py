"""What ComfyUI hangs on the layers of a model, and what torch does not type of them.

Seen in ComfyUI 0.18.2, 0.24.1 and 0.30.0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch

if TYPE_CHECKING:
    from comfy.ops import CastWeightBiasOp

    from .types import WeightFunction

    class LayerBase(torch.nn.Module, CastWeightBiasOp):
        """What a mixin for ComfyUI's Linear and Conv2d finds behind it."""

        weight: torch.Tensor
        bias: Any  # a tensor or None; torch's Linear claims it always has one

else:
    LayerBase = object  # the class it is mixed into brings all that


def weight_of(layer: torch.nn.Module) -> torch.Tensor:
    """A layer's weight; for torch any attribute of a module could be a module too."""
    return cast(torch.Tensor, layer.weight)


def uncompiled(name: str) -> str:
    """A module's name without what torch.compile puts in it.

    Seen in torch 2.11. If torch renamed ``_orig_mod``, sessions and files would not fit compiled models.
    """
    return name.replace("_orig_mod.", "")


def weight_functions(module: torch.nn.Module) -> Sequence[WeightFunction]:
    """What changes a layer's weight at each call, in order; nothing for a module that is not a layer.

    If ComfyUI no longer ran what stands in ``weight_function``, exact LoRAs would not be added.
    """
    return cast("Sequence[WeightFunction]", getattr(module, "weight_function", ()))


def set_weight_functions(layer: torch.nn.Module, functions: list[WeightFunction]) -> None:
    """Let these, and only these, change the layer's weight at each call; see ``weight_functions``."""
    layer.weight_function = functions  # type: ignore[assignment] # torch: a tensor or a module


def lowvram_function(layer: torch.nn.Module) -> object:
    """ComfyUI's LoRAs of a layer whose weight dynamic VRAM streams, or None.

    ComfyUI spells it ``param_key + "_lowvram_function"``. If it vanished, layers with such LoRAs would keep
    multiplying in FP8.
    """
    return getattr(layer, "weight_lowvram_function", None)


def drop_lowvram_function(layer: torch.nn.Module) -> None:
    """Let dynamic VRAM add no LoRA to the layer's weight; see ``lowvram_function``.

    If that vanished, exact LoRAs would be added twice to what it streams, the first time rounded to FP8.
    """
    if lowvram_function(layer) is not None:
        layer.weight_lowvram_function = None  # type: ignore[assignment] # torch: a tensor or a module


def changes_at_calls(layer: LayerBase) -> bool:
    """Whether anything changes the layer's weight or bias at each call.

    Without ``weight_function`` or ``bias_function`` this raises AttributeError.
    """
    return bool(layer.weight_function or layer.bias_function or lowvram_function(layer))


def is_cast_forced(layer: torch.nn.Module) -> bool:
    """Whether the user asked for a dtype to compute in: ComfyUI then multiplies in no other.

    Without ``comfy_force_cast_weights`` layers that were measured for it would multiply in FP8 all the same.
    """
    return bool(getattr(layer, "comfy_force_cast_weights", False))


def is_loaded(layer: torch.nn.Module) -> bool:
    """Whether ComfyUI holds the layer's weight on the device, rather than streaming it.

    Without ``comfy_patched_weights`` Save nodes would write the weights of exact LoRAs without them.
    """
    return bool(getattr(layer, "comfy_patched_weights", False))
