"""Model families: one row each. Differences between models live here and nowhere else."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class NeverQuantized:
    """Layers that stay in the source's precision whatever the budget.

    Attributes:
        pattern: regular expression on the whole layer name.
        reason: shown in the report.
        source: who else keeps it.
    """

    pattern: str
    reason: str
    source: str


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        name: shown to the user, written to sessions and headers.
        keys: state-dict keys (without the diffusion-model prefix) that together identify it.
        without: keys that must be absent.
        never: layers never quantized.
    """

    name: str
    keys: tuple[str, ...]
    without: tuple[str, ...] = ()
    never: tuple[NeverQuantized, ...] = ()

    def never_reason(self, layer: str) -> str | None:
        """Why ``layer`` is never quantized, or None."""
        return next((row.reason for row in self.never if re.fullmatch(row.pattern, layer)), None)


_UNET_ENDS = (
    NeverQuantized(r"input_blocks\.0\.0", "first layer, reads the latent", "llama.cpp's SD patch, ModelOpt"),
    NeverQuantized(r"out\.2", "last layer, writes the prediction", "llama.cpp's SD patch, ModelOpt"),
)
_DIT_SOURCE = "ComfyUI-GGUF, ModelOpt, convert_to_quant"
_FLUX_ENDS = (
    NeverQuantized("img_in", "first layer, reads the latent", _DIT_SOURCE),
    NeverQuantized(r"final_layer\.linear", "last layer, writes the prediction", _DIT_SOURCE),
)
_LUMINA_ENDS = (
    NeverQuantized("x_embedder", "first layer, reads the latent", _DIT_SOURCE),
    NeverQuantized(r"final_layer\.linear", "last layer, writes the prediction", _DIT_SOURCE),
)

# First match wins. SDXL and SD1.5 share their layout; SDXL alone has the second conditioning vector.
# Lumina 2 modulates through SiLU then Linear (index 1), Z-Image through a Linear alone (index 0).
FAMILIES = (
    Family("SDXL", ("input_blocks.0.0.weight", "label_emb.0.0.weight", "out.2.weight"), never=_UNET_ENDS),
    Family("SD1.5", ("input_blocks.0.0.weight", "out.2.weight"), without=("label_emb.0.0.weight",), never=_UNET_ENDS),
    Family(
        "Flux",
        ("double_blocks.0.img_attn.qkv.weight", "img_in.weight", "vector_in.in_layer.weight"),
        without=("distilled_guidance_layer.in_proj.weight", "double_stream_modulation_img.lin.weight"),
        never=_FLUX_ENDS,
    ),
    Family(
        "Z-Image",
        ("cap_embedder.1.weight", "noise_refiner.0.attention.k_norm.weight", "layers.0.adaLN_modulation.0.weight"),
        never=_LUMINA_ENDS,
    ),
    Family(
        "Lumina2",
        ("cap_embedder.1.weight", "noise_refiner.0.attention.k_norm.weight", "layers.0.adaLN_modulation.1.weight"),
        never=_LUMINA_ENDS,
    ),
)
GENERIC = Family("generic", ())


def detect_family(keys: Collection[str]) -> Family:
    """The family whose keys are all present; ``GENERIC`` for any other model.

    Args:
        keys: state-dict keys without the diffusion-model prefix.
    """
    for family in FAMILIES:
        if all(key in keys for key in family.keys) and not any(key in keys for key in family.without):
            return family
    return GENERIC


def family_named(name: str) -> Family:
    """The row called ``name``; an unknown name (a session of a newer release) is treated as generic."""
    return next((family for family in FAMILIES if family.name == name), GENERIC)
