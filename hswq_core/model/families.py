"""Model families, one row each. All differences between models live here."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class NeverQuantized:
    """Layers that stay in the source's precision regardless of the budget.

    Attributes:
        pattern: regular expression matched against the whole layer name.
        reason: shown in the report.
        source: other tools that keep it too.
    """

    pattern: str
    reason: str
    source: str


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        name: shown to the user, written to sessions and headers.
        keys: state-dict keys (without the diffusion-model prefix) that must all be present.
        without: keys that must be absent.
        never: layers that are never quantized.
        rows: {key: required first dimension}, where names alone are ambiguous.
        text_encoder: opened by Load CLIP, not by diffusion model loaders.
        stock_scales: whether ComfyUI's loader for it applies ``weight_scale``; otherwise it would run the bare codes.
    """

    name: str
    keys: tuple[str, ...]
    without: tuple[str, ...] = ()
    never: tuple[NeverQuantized, ...] = ()
    rows: Mapping[str, int] = field(default_factory=dict)
    text_encoder: bool = False
    stock_scales: bool = True

    def matches(self, shapes: Mapping[str, Sequence[int]]) -> bool:
        """Whether a model with these keys and shapes belongs to the family."""
        return (
            all(key in shapes for key in self.keys)
            and not any(key in shapes for key in self.without)
            and all(key in shapes and shapes[key][0] == rows for key, rows in self.rows.items())
        )

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
_TEXT_SOURCE = "convert_to_quant, Clybius' scripts"
_TOKENS = r"(.*\.)?(shared|(embed_tokens|token_embedding|position_embedding|relative_attention_bias)[^.]*)"
_TEXT_ENCODER = (
    NeverQuantized(_TOKENS, "embedding, looked up and not multiplied", _TEXT_SOURCE),
    NeverQuantized(r"(.*\.)?lm_head", "writes words, unused when encoding", _TEXT_SOURCE),
    NeverQuantized(r"decoder\..*", "decoder, unused when encoding", _TEXT_SOURCE),
)
_SIGHT = NeverQuantized(r"(visual|vision_model|multi_modal_projector)\..*", "sees pictures, reads no text", "guess")
_T5_FIRST = "encoder.block.0.layer.0.SelfAttention.k.weight"
_T5_WIDE = "encoder.block.23.layer.1.DenseReluDense.wi_1.weight"

# First match wins. SDXL and SD1.5 share a layout; only SDXL has the second conditioning vector.
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
        "Chroma",
        ("double_blocks.0.img_attn.qkv.weight", "img_in.weight", "distilled_guidance_layer.in_proj.weight"),
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
    # Among text encoders ComfyUI reads scales only for T5-XXL and language models (comfy/sd.py: t5xxl_detect,
    # llama_detect).
    Family("T5-XXL", (_T5_FIRST,), never=_TEXT_ENCODER, rows={_T5_WIDE: 10240}, text_encoder=True),
    Family("T5", (_T5_FIRST,), never=_TEXT_ENCODER, text_encoder=True, stock_scales=False),
    Family(
        "CLIP",
        ("text_model.encoder.layers.0.mlp.fc1.weight", "text_model.embeddings.token_embedding.weight"),
        never=_TEXT_ENCODER,
        text_encoder=True,
        stock_scales=False,
    ),
    # Qwen, Gemma, Mistral, Llama.
    Family(
        "language model",
        ("model.embed_tokens.weight", "model.layers.0.self_attn.k_proj.weight"),
        never=(*_TEXT_ENCODER, _SIGHT),
        text_encoder=True,
    ),
)
GENERIC = Family("generic", ())


def detect_family(shapes: Mapping[str, Sequence[int]]) -> Family:
    """The first matching family; ``GENERIC`` if none matches.

    Args:
        shapes: {state-dict key without the diffusion-model prefix: tensor shape}.
    """
    return next((family for family in FAMILIES if family.matches(shapes)), GENERIC)


def family_named(name: str) -> Family:
    """The row called ``name``; ``GENERIC`` for unknown names (from a newer release's session)."""
    return next((family for family in FAMILIES if family.name == name), GENERIC)
