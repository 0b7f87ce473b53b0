"""Text encoders with their real key names, converted file to file and opened by ComfyUI's Load CLIP code."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hswq.hswq_core.convert.file import FileJob, FileRequest
from hswq.hswq_core.files.checkpoint import FileSource
from hswq.hswq_core.plan.plan import QUANTIZE
from hswq.hswq_core.quant.grid import FLOAT8_E4M3FN
from safetensors.torch import save_file

pytestmark = pytest.mark.comfy

PROMPT = "a lighthouse on a cliff at dusk, long exposure"


@dataclass(frozen=True)
class Kind:
    """A text encoder.

    Attributes:
        module: (sizes) -> ComfyUI's own module for it, with these sizes, on the meta device.
        sizes: sizes that are smaller than in the real one.
        option: entry of model_options that tells ComfyUI the sizes.
        types: Load CLIP's types for it.
        gain: factor on the weights; without a scale, small ones would be kept in 16 bits.
    """

    module: Callable[[dict[str, Any]], torch.nn.Module]
    sizes: dict[str, Any]
    option: str
    types: tuple[str, ...]
    gain: float = 1.0


def t5(sizes: dict[str, Any]) -> torch.nn.Module:
    from comfy.text_encoders import t5 as t5_module

    text = (Path(t5_module.__file__).parent / "t5_config_xxl.json").read_text(encoding="utf-8")
    return t5_module.T5({**json.loads(text), **sizes}, torch.float16, META, ops())


def clip_l(sizes: dict[str, Any]) -> torch.nn.Module:
    from comfy import clip_model, sd1_clip

    text = (Path(sd1_clip.__file__).parent / "sd1_clip_config.json").read_text(encoding="utf-8")
    return clip_model.CLIPTextModel({**json.loads(text), **sizes}, torch.float16, META, ops())


def qwen(sizes: dict[str, Any]) -> torch.nn.Module:
    from comfy.text_encoders import llama

    return llama.Qwen3_4B(sizes, torch.float16, META, ops())


def ops() -> Any:
    import comfy.ops

    return comfy.ops.disable_weight_init


META = torch.device("meta")
KINDS = {
    "t5xxl": Kind(t5, {"d_model": 256, "num_heads": 4}, "t5xxl_model_config", ("SD3", "FLUX")),
    "clip_l": Kind(clip_l, {}, "clip_l_model_config", ("STABLE_DIFFUSION",), 20.0),
    "qwen": Kind(qwen, {"num_hidden_layers": 3, "vocab_size": 2048}, "qwen3_4b_model_config", ("LUMINA2",)),
}


class Tool:
    """What the tests need from ComfyUI."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def source(self, name: str) -> Path:
        """The source file of a kind, made once."""
        path = self.folder / f"{name}.safetensors"
        if not path.exists():
            kind, rng = KINDS[name], torch.Generator().manual_seed(0)
            module = kind.module(kind.sizes)
            save_file({key: drawn(key, t, rng, kind.gain) for key, t in module.state_dict().items()}, path)
        return path

    def load(self, name: str, path: Path, clip_type: str) -> Any:
        """Load a file with Load CLIP's code, with no missing and no unexpected keys."""
        import comfy.sd

        kind = KINDS[name]
        return comfy.sd.load_clip(
            [str(path)],
            clip_type=comfy.sd.CLIPType[clip_type],
            model_options={kind.option: kind.sizes},
        )


def drawn(key: str, like: torch.Tensor, rng: torch.Generator, gain: float) -> torch.Tensor:
    shape = tuple(like.shape)
    if not like.is_floating_point():
        return torch.arange(shape[-1]).expand(shape).contiguous()
    if len(shape) < 2:
        return (torch.zeros if key.endswith("bias") else torch.ones)(shape, dtype=torch.float16)
    std = 0.5 if "embed" in key or "shared" in key else gain * 0.7 / math.sqrt(shape[1])
    return (torch.randn(shape, generator=rng) * std).half()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("encoders")


@pytest.fixture
def tool(comfy, folder) -> Tool:
    return Tool(folder)


def converted(path: Path, file_format: str = "comfy", preset: str = "auto") -> tuple[Path, Any]:
    job = FileJob.open(path, FileRequest.named("nearest", file_format, preset=preset))
    done = job.write(job.target(path.parent))
    return done.path, done.plan


def encoded(clip: Any) -> torch.Tensor:
    with torch.inference_mode():
        return clip.encode_from_tokens(clip.tokenize(PROMPT))


def linears(clip: Any) -> dict[str, Any]:
    """{layer name in the file: module}."""
    modules = clip.cond_stage_model.named_modules()
    return {key.split("transformer.")[-1]: m for key, m in modules if type(m).__name__ == "Linear"}


def with_weights_of(clip: Any, path: Path, plan: Any) -> Any:
    """The CLIP with the quantized layers' weights dequantized by core, in float32."""
    file, modules = FileSource(path), linears(clip)
    for layer in plan.layers:
        if layer.action == QUANTIZE:
            scale = file.read(f"{layer.name}.weight_scale") if layer.scaled else None
            weight = FLOAT8_E4M3FN.dequantize(file.read(f"{layer.name}.weight"), scale)
            modules[layer.name].weight = torch.nn.Parameter(weight, requires_grad=False)
    return clip


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("file_format", [pytest.param("comfy", marks=pytest.mark.compat), "v1"])
def test_stock_load_clip_opens_it_whole(tool, name, file_format, caplog):
    path, plan = converted(tool.source(name), file_format)
    assert plan.counts()[QUANTIZE] >= 4
    for clip_type in KINDS[name].types:
        caplog.clear()
        with caplog.at_level(logging.DEBUG):
            clip = tool.load(name, path, clip_type)
        assert [r.message for r in caplog.records if "missing" in r.message or "unexpected" in r.message] == []
        modules = linears(clip)
        for layer in plan.layers:
            if layer.action == QUANTIZE and layer.scaled:
                assert modules[layer.name].weight._qdata.dtype == torch.float8_e4m3fn


@pytest.mark.parametrize("name", ["t5xxl", "clip_l"])
@pytest.mark.parametrize("file_format", [pytest.param("comfy", marks=pytest.mark.compat), "v1"])
def test_it_encodes_as_the_dequantized_weights_do(tool, name, file_format):
    """ComfyUI computes text encoders in float32."""
    path, plan = converted(tool.source(name), file_format)
    clip_type = KINDS[name].types[0]
    ours = encoded(tool.load(name, path, clip_type))
    stock = tool.load(name, tool.source(name), clip_type)
    original, twin = encoded(stock), encoded(with_weights_of(stock, path, plan))
    assert ours.isfinite().all()
    assert torch.equal(ours, twin)
    assert not torch.equal(ours, original)


@pytest.mark.compat
def test_a_scale_where_comfyui_reads_none_would_be_lost(tool, caplog):
    """The reason why CLIP has unscaled weights in the comfy format: once this fails, it may have scales too."""
    path, _ = converted(tool.source("clip_l"))
    state = {key: FileSource(path).read(key) for key in FileSource(path).entries}
    key = "text_model.encoder.layers.0.mlp.fc1"
    state[f"{key}.weight_scale"] = torch.tensor(2.0)
    state[f"{key}.comfy_quant"] = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    save_file(state, path.with_suffix(".scaled.safetensors"))
    with caplog.at_level(logging.DEBUG):
        clip = tool.load("clip_l", path.with_suffix(".scaled.safetensors"), "STABLE_DIFFUSION")
    assert any("unexpected" in r.message and "weight_scale" in r.message for r in caplog.records)
    assert torch.equal(encoded(clip), encoded(tool.load("clip_l", path, "STABLE_DIFFUSION")))


@pytest.mark.compat
def test_a_whole_t5_is_opened_without_its_decoder(tool, caplog):
    path = tool.source("t5xxl")
    state = {key: FileSource(path).read(key) for key in FileSource(path).entries}
    words = state["shared.weight"]
    decoder = {
        f"decoder{k.removeprefix('encoder')}": t.clone() for k, t in state.items() if k.startswith("encoder.block.0.")
    }
    whole = path.with_name("whole.safetensors")
    rest = {"lm_head.weight": words.clone(), "encoder.embed_tokens.weight": words.clone()}
    save_file({**state, **decoder, **rest}, whole)
    with caplog.at_level(logging.DEBUG):
        clip = tool.load("t5xxl", converted(whole, preset="encoder_only")[0], "SD3")
    assert not any("unexpected" in r.message for r in caplog.records)
    assert torch.equal(encoded(clip), encoded(tool.load("t5xxl", converted(path)[0], "SD3")))
