"""Files of text encoders and presets: small files with the real key names, converted and looked into."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hswq.hswq_core.convert.file import FileJob, FileRequest
from hswq.hswq_core.errors import LayerError, SettingError
from hswq.hswq_core.files.checkpoint import FileSource
from hswq.hswq_core.methods.hswq import HSWQSettings
from hswq.hswq_core.methods.method import method_named
from hswq.hswq_core.methods.table import METHODS
from hswq.hswq_core.model.presets import PRESETS, preset_named
from hswq.hswq_core.plan.plan import Plan
from hswq.hswq_core.progress import no_progress
from safetensors.torch import save_file

WIDE = "encoder.block.23.layer.1.DenseReluDense.wi_1.weight"
T5 = {
    "shared.weight": (300, 192),
    "encoder.embed_tokens.weight": (300, 192),
    "encoder.block.0.layer.0.SelfAttention.k.weight": (192, 192),
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (32, 4),
    "encoder.block.0.layer.0.layer_norm.weight": (192,),
    WIDE: (256, 192),
    "encoder.final_layer_norm.weight": (192,),
    "decoder.block.0.layer.1.EncDecAttention.q.weight": (192, 192),
    "decoder.final_layer_norm.weight": (192,),
    "lm_head.weight": (300, 192),
}
CLIP = {
    "text_model.embeddings.token_embedding.weight": (300, 192),
    "text_model.encoder.layers.0.mlp.fc1.weight": (256, 192),
    "text_model.encoder.layers.0.mlp.fc1.bias": (256,),
    "text_model.encoder.layers.0.layer_norm1.weight": (192,),
    "text_projection.weight": (192, 192),
}
LANGUAGE = {
    "model.embed_tokens.weight": (300, 192),
    "model.layers.0.self_attn.k_proj.weight": (192, 192),
    "model.layers.0.input_layernorm.weight": (192,),
    "visual.blocks.0.attn.qkv.weight": (192, 192),
    "lm_head.weight": (300, 192),
}
CHROMA = {
    "img_in.weight": (192, 128),
    "double_blocks.0.img_attn.qkv.weight": (192, 192),
    "distilled_guidance_layer.in_proj.weight": (192, 192),
    "distilled_guidance_layer.layers.0.in_layer.weight": (192, 192),
    "final_layer.linear.weight": (192, 192),
}
XXL = {**T5, WIDE: (10240, 4)}


def made(folder: Path, shapes: dict[str, tuple[int, ...]], spread: float = 0.02) -> Path:
    rng = torch.Generator().manual_seed(0)
    state = {key: (torch.randn(shape, generator=rng) * spread).half() for key, shape in shapes.items()}
    state["spiece_model"] = torch.arange(200, dtype=torch.uint8)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt", "who": "me"})
    return folder / "model.safetensors"


def request(file_format: str, preset: str = "auto", device: str = "cpu", method: str = "nearest") -> FileRequest:
    row = METHODS[method]
    return FileRequest(row, row.chosen(object()), file_format, preset=preset_named(preset), device=device)


def converted(path: Path, file_format: str = "comfy", preset: str = "auto") -> tuple[FileSource, str]:
    job = FileJob.open(path, request(file_format, preset))
    done = job.write(job.target(path.parent / "out"), no_progress)
    return FileSource(done.path), done.report


def dtypes(source: FileSource) -> dict[str, torch.dtype]:
    return {key: info.dtype for key, info in source.entries.items()}


FP8, FP16 = torch.float8_e4m3fn, torch.float16


@pytest.mark.parametrize(
    ("shapes", "family", "quantized", "scaled"),
    [
        (XXL, "T5-XXL", {"encoder.block.0.layer.0.SelfAttention.k", WIDE[: -len(".weight")]}, True),
        (T5, "T5,", {"encoder.block.0.layer.0.SelfAttention.k", WIDE[: -len(".weight")]}, False),
        (CLIP, "CLIP", {"text_model.encoder.layers.0.mlp.fc1", "text_projection"}, False),
        (LANGUAGE, "language model", {"model.layers.0.self_attn.k_proj"}, True),
    ],
    ids=["T5-XXL", "T5", "CLIP", "language model"],
)
def test_only_what_multiplies_is_quantized_with_scales_where_comfyui_reads_them(
    tmp_path, shapes, family, quantized, scaled
):
    """Weights of 0.5: large enough that a layer without a scale loses little and is not kept."""
    path = made(tmp_path, shapes, 0.5)
    source, text = converted(path)
    before, found = FileSource(path), dtypes(source)
    assert text.splitlines()[1].startswith(family)
    assert text.splitlines()[1].endswith("comfy, method nearest, without calibration")
    for key, dtype in found.items():
        stem, _, last = key.rpartition(".")
        if last in ("weight_scale", "comfy_quant"):
            assert scaled
            assert stem in quantized
        elif last == "weight" and stem in quantized:
            assert dtype == FP8
            assert (f"{stem}.weight_scale" in found) == scaled == (f"{stem}.comfy_quant" in found)
        else:
            assert dtype == before.entries[key].dtype
            assert torch.equal(source.read(key), before.read(key))
    assert {key for key in found if not key.endswith(("weight_scale", "comfy_quant"))} == set(before.entries)
    assert source.metadata["who"] == "me"
    assert ("no less memory" in text) != scaled


@pytest.mark.parametrize("shapes", [CLIP, T5])
def test_a_layer_that_an_unscaled_cast_would_hurt_stays(tmp_path, shapes):
    source, text = converted(made(tmp_path, shapes, 2e-3))
    assert FP8 not in dtypes(source).values()
    assert "unscaled Linear would lose" in text


@pytest.mark.parametrize("shapes", [XXL, CLIP, LANGUAGE])
def test_a_text_encoder_has_no_v2(tmp_path, shapes):
    with pytest.raises(SettingError, match=r"v2 for a text encoder.*comfy or v1.*Load CLIP"):
        converted(made(tmp_path, shapes), "v2")


def test_encoder_only_leaves_out_what_encoding_does_not_need(tmp_path):
    path = made(tmp_path, XXL)
    source, text = converted(path, preset="encoder_only")
    gone = {key for key in FileSource(path).entries if key not in source.entries}
    assert gone == {
        "decoder.block.0.layer.1.EncDecAttention.q.weight",
        "decoder.final_layer_norm.weight",
        "lm_head.weight",
        "encoder.embed_tokens.weight",
    }
    assert source.entries["shared.weight"].dtype == FP16
    assert "left out, as preset encoder_only says: 4 tensors" in text
    assert "left out" not in converted(path)[1]


@pytest.mark.parametrize("file_format", ["comfy", "v1", "v2"])
def test_guidance_is_kept_on_request_and_has_no_scale_that_would_make_a_loader_cast_it(tmp_path, file_format):
    path = made(tmp_path, CHROMA)
    source, text = converted(path, file_format, "keep_guidance")
    guidance = {key: dtype for key, dtype in dtypes(source).items() if key.startswith("distilled_guidance_layer")}
    assert set(guidance) == {key for key in CHROMA if key.startswith("distilled_guidance_layer")}
    assert set(guidance.values()) == {FP16}
    assert "2 skipped" not in text
    assert "asked for by the preset: 2" in text
    plain = dtypes(converted(path, file_format)[0])
    assert plain["distilled_guidance_layer.in_proj.weight"] == FP8


def test_the_same_file_whatever_the_device_is_called(tmp_path):
    path = made(tmp_path, XXL)
    job = FileJob.open(path, request("comfy", device="cpu"))
    assert job.model.read(job.model.layers[0]).device.type == "cpu"
    assert FileJob.open(path, request("comfy", device="meta")).model.read(job.model.layers[0]).device.type == "meta"


def test_unknown_words_are_refused():
    with pytest.raises(SettingError, match=r"preset.*'none'.*auto or encoder_only"):
        preset_named("none")
    with pytest.raises(SettingError, match=r"method.*'best'.*hswq or learned or nearest"):
        method_named("best", METHODS)


def test_a_method_that_needs_a_session_is_refused_without_one():
    with pytest.raises(SettingError, match=r"session: got none.*method hswq"):
        FileRequest(METHODS["hswq"], HSWQSettings(), "v2")


def test_a_file_is_named_after_its_method_and_format(tmp_path):
    path = made(tmp_path, CHROMA)
    for method in ("nearest", "learned"):
        job = FileJob.open(path, request("v1", method=method))
        assert job.target(tmp_path).name == f"model_{method}_v1.safetensors"


def test_a_check_gets_the_plan_and_may_refuse_the_file(tmp_path):
    path, seen = made(tmp_path, CHROMA), []
    before = set(tmp_path.iterdir())
    job = FileJob.open(path, request("v2"))

    def refuse(temporary: Path, plan: Plan) -> None:
        seen.append((temporary.exists(), plan.counts()["quantize"]))
        raise LayerError("Layer x", got="noise", expected="the weight", remedy="Report this.")

    with pytest.raises(LayerError):
        job.write(job.target(tmp_path), no_progress, refuse)
    assert seen == [(True, 3)]  # not the two ends
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize("preset", PRESETS.values(), ids=lambda row: row.name)
def test_every_preset_says_what_it_is_for(preset):
    assert preset.help
    assert preset_named(preset.name) is preset
