"""What a MODEL is made of: its Linear and Conv2d layers, original weights, family and fingerprint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..hswq_core.calibration.observer import LayerStats
from ..hswq_core.errors import LayerError
from ..hswq_core.methods.decide import already_quantized
from ..hswq_core.model.families import Family, detect_family
from ..hswq_core.model.fingerprint import Fingerprint, layout_hash, sample_weights
from ..hswq_core.model.kinds import KINDS, kind_of
from ..hswq_core.model.layer import weight_key
from ..hswq_core.quant.schemes.table import holds_codes
from .comfyui.layers import uncompiled, weight_of
from .comfyui.tensors import is_quantized

if TYPE_CHECKING:
    from .comfyui.types import KeyPatches, ModelPatcher

PARAMETER_PREFIX = "diffusion_model."


@dataclass(frozen=True)
class ModelInfo:
    """A model's identity.

    Attributes:
        family: row of the families table.
        kinds: {layer name: kind} of every Linear and Conv2d, in model order.
        fingerprint: of layer names, shapes and weights.
        empty: empty statistics for every layer; copy before use.
    """

    family: Family
    kinds: dict[str, str]
    fingerprint: Fingerprint
    empty: dict[str, LayerStats]


def layer_modules(diffusion_model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """{name: module} of every Linear and Conv2d, in model order.

    By type name, see ``LayerKind``.
    """
    return {
        uncompiled(name): module for name, module in diffusion_model.named_modules() if type(module).__name__ in KINDS
    }


def empty_stats(module: torch.nn.Module) -> LayerStats:
    """Empty statistics for ``module``."""
    kind = kind_of(module)
    return LayerStats.empty(kind.name, tuple(weight_of(module).shape), kind.channels(module))


def original(key_patch: KeyPatches) -> torch.Tensor:
    """First element of ComfyUI's key patches, (weight, convert_func), as a plain tensor."""
    weight, convert = key_patch[0]
    tensor: torch.Tensor = convert(weight, inplace=False)
    return tensor.detach()


def inspect_model(patcher: ModelPatcher) -> ModelInfo:
    """Layers, family and fingerprint of a MODEL.

    Raises:
        LayerError: a layer is already quantized, or there is none.
    """
    modules = layer_modules(patcher.model.diffusion_model)
    _require_layers(modules, type(patcher.model).__name__)
    return inspect_layers(patcher, modules, PARAMETER_PREFIX)


def inspect_layers(patcher: ModelPatcher, modules: dict[str, torch.nn.Module], prefix: str) -> ModelInfo:
    """``inspect_model`` for some layers of any model that a patcher holds.

    Args:
        modules: {name: module} of the layers.
        prefix: of their keys in the patcher's model.

    Raises:
        LayerError: a layer is already quantized.
    """
    for name, module in modules.items():
        _require_unquantized(name, weight_of(module))
    empty = {name: empty_stats(module) for name, module in modules.items()}
    patches = patcher.get_key_patches(prefix)
    weights = sample_weights(modules, lambda name: original(patches[weight_key(name, prefix)]))
    layout = layout_hash({name: (stats.kind, stats.shape) for name, stats in empty.items()})
    shapes = {key[len(prefix) :]: patch[0][0].shape for key, patch in patches.items()}
    kinds = {name: stats.kind for name, stats in empty.items()}
    return ModelInfo(detect_family(shapes), kinds, Fingerprint(layout, weights), empty)


def _require_layers(modules: dict[str, torch.nn.Module], model_name: str) -> None:
    if not modules:
        raise LayerError(
            f"Model {model_name}",
            got=f"no {' or '.join(KINDS)} layer",
            expected="a diffusion model",
            remedy="Connect the MODEL of a checkpoint or diffusion model loader.",
        )


def is_eight_bit(weight: torch.Tensor) -> bool:
    """Whether a parameter is quantized already, with a scale or without."""
    return is_quantized(weight) or holds_codes(weight.dtype)


def _require_unquantized(name: str, weight: torch.Tensor) -> None:
    if is_eight_bit(weight):
        raise already_quantized(
            name,
            "an already quantized (FP8) model",
            "Load the original FP16/BF16 file, with weight_dtype 'default' if the loader has that input.",
        )
