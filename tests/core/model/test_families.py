from __future__ import annotations

import re

import pytest
from hswq.hswq_core.model import families
from hswq.hswq_core.model.families import FAMILIES, GENERIC, detect_family, family_named

# Real layer names of each family, its ends first, then layers that look like them but are none.
UNET = [
    "input_blocks.0.0",
    "out.2",
    "time_embed.0",
    "time_embed.2",
    "input_blocks.1.0.in_layers.2",
    "input_blocks.1.0.emb_layers.1",
    "input_blocks.3.0.op",
    "input_blocks.4.1.transformer_blocks.0.attn1.to_q",
    "input_blocks.4.1.transformer_blocks.0.attn2.to_out.0",
    "input_blocks.4.1.transformer_blocks.0.ff.net.0.proj",
    "input_blocks.10.0.out_layers.3",
    "middle_block.1.proj_in",
    "output_blocks.2.2.conv",
    "output_blocks.0.0.skip_connection",
]
FLUX = [
    "img_in",
    "final_layer.linear",
    "txt_in",
    "time_in.in_layer",
    "vector_in.in_layer",
    "guidance_in.out_layer",
    "double_blocks.0.img_attn.qkv",
    "double_blocks.0.img_mod.lin",
    "double_blocks.0.txt_mlp.2",
    "single_blocks.0.linear1",
    "single_blocks.0.modulation.lin",
    "final_layer.adaLN_modulation.1",
]
LUMINA = [
    "x_embedder",
    "final_layer.linear",
    "t_embedder.mlp.0",
    "cap_embedder.1",
    "noise_refiner.0.attention.qkv",
    "context_refiner.1.feed_forward.w2",
    "layers.0.attention.out",
    "layers.0.feed_forward.w1",
    "final_layer.adaLN_modulation.1",
]
T5 = [
    "shared",
    "encoder.embed_tokens",
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
    "lm_head",
    "decoder.block.0.layer.1.EncDecAttention.q",
    "encoder.block.0.layer.0.SelfAttention.q",
    "encoder.block.0.layer.0.SelfAttention.k",
    "encoder.block.23.layer.0.SelfAttention.o",
    "encoder.block.23.layer.1.DenseReluDense.wi_1",
    "encoder.block.23.layer.1.DenseReluDense.wo",
]
CLIP = [
    "text_model.embeddings.token_embedding",
    "text_model.embeddings.position_embedding",
    "text_model.encoder.layers.0.self_attn.q_proj",
    "text_model.encoder.layers.0.mlp.fc1",
    "text_projection",
]
LANGUAGE = [
    "model.embed_tokens",
    "lm_head",
    "visual.blocks.0.attn.qkv",
    "visual.merger.mlp.0",
    "vision_model.embeddings.patch_embedding",
    "multi_modal_projector.linear",
    "model.layers.0.self_attn.k_proj",
    "model.layers.0.self_attn.q_norm",
    "model.layers.35.mlp.down_proj",
]
FLUX_ALONE = {"vector_in.in_layer", "guidance_in.out_layer"}
LAYERS = {
    "SDXL": [*UNET, "label_emb.0.0", "label_emb.0.2"],
    "SD1.5": UNET,
    "Flux": FLUX,
    "Chroma": [*(layer for layer in FLUX if layer not in FLUX_ALONE), "distilled_guidance_layer.in_proj"],
    "Z-Image": [*LUMINA, "layers.0.adaLN_modulation.0"],
    "Lumina2": [*LUMINA, "layers.0.adaLN_modulation.1"],
    "T5-XXL": T5,
    "T5": T5,
    "CLIP": CLIP,
    "language model": LANGUAGE,
}
# How many of the layers above, the first, are never quantized.
NEVER = {"T5-XXL": 5, "T5": 5, "CLIP": 2, "language model": 6}
ENDS = {name: set(layers[: NEVER.get(name, 2)]) for name, layers in LAYERS.items()}
# Tensors of no Linear or Conv2d that tell families apart.
OTHERS = {name: ["noise_refiner.0.attention.k_norm.weight"] for name in ("Z-Image", "Lumina2")}
WIDTHS = {"T5-XXL": {"encoder.block.23.layer.1.DenseReluDense.wi_1.weight": 10240}}


def model(family: str) -> dict[str, tuple[int, ...]]:
    names = {f"{layer}.{part}" for layer in LAYERS[family] for part in ("weight", "bias")} | set(OTHERS.get(family, []))
    return {key: (WIDTHS.get(family, {}).get(key, 64), 64) for key in names}


def with_key(shapes: dict[str, tuple[int, ...]], key: str) -> dict[str, tuple[int, ...]]:
    return {**shapes, key: (64, 64)}


def test_the_tests_know_every_row():
    assert [family.name for family in FAMILIES] == list(LAYERS)


@pytest.mark.parametrize("name", LAYERS)
def test_a_models_keys_are_recognized(name):
    assert detect_family(model(name)).name == name


@pytest.mark.parametrize("name", LAYERS)
def test_a_familys_keys_match_exactly_one_row_whatever_the_order(name, monkeypatch):
    """But for the row of all T5, which comes after that of the one ComfyUI reads scales of."""
    found = set()
    for row in FAMILIES:
        monkeypatch.setattr(families, "FAMILIES", (row,))
        found.add(detect_family(model(name)).name)
    assert found - ({"T5"} if name == "T5-XXL" else set()) == {name, GENERIC.name}


@pytest.mark.parametrize(
    "unknown",
    [
        {},
        {"some.weight": (64, 64)},
        {"out.2.weight": (64, 64), "label_emb.0.0.weight": (64, 64)},
        with_key(model("Flux"), "double_stream_modulation_img.lin.weight"),  # Flux.2
        {f"model.diffusion_model.{key}": shape for key, shape in model("SDXL").items()},  # prefix not taken off
    ],
)
def test_any_other_model_is_generic(unknown):
    assert detect_family(unknown) is GENERIC


@pytest.mark.parametrize("name", LAYERS)
def test_only_the_ends_of_a_model_are_never_quantized(name):
    family = family_named(name)
    assert {layer for layer in LAYERS[name] if family.never_reason(layer)} == ENDS[name]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_pattern_matches_a_real_layer_of_its_family(family):
    assert family.never
    known = {
        layer for name in LAYERS if family_named(name).text_encoder == family.text_encoder for layer in LAYERS[name]
    }
    for row in family.never:
        assert [layer for layer in known if re.fullmatch(row.pattern, layer)]
        assert row.reason
        assert row.source


@pytest.mark.parametrize("name", [name for name in LAYERS if not family_named(name).text_encoder])
def test_a_longer_name_is_another_layer(name):
    for end in ENDS[name]:
        assert family_named(name).never_reason(f"{end}.proj") is None
        assert family_named(name).never_reason(f"blocks.{end}") is None


def test_the_generic_row_never_keeps_a_layer_by_name():
    everything = {layer for layers in LAYERS.values() for layer in layers}
    assert {GENERIC.never_reason(layer) for layer in everything} == {None}


def test_rows_are_found_by_name_and_a_newer_releases_name_is_generic():
    assert [family_named(family.name) for family in FAMILIES] == list(FAMILIES)
    assert family_named("HunyuanImage 9") is GENERIC
    assert len({family.name for family in (*FAMILIES, GENERIC)}) == len(FAMILIES) + 1
