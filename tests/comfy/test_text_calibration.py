"""Recording text encoders while they encode prompts: in the real server, and in this process against plain hooks."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from hswq.hswq_core.calibration.session import load_session
from hswq.hswq_core.errors import LayerError
from PIL import Image
from rig import flow, graph, tiny
from rig.client import Prompt
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.comfy

CLIP = "cond_stage_model.transformer."
LAYERS = 12 * 6


def workflow(server, session: str, seed: int = 0, texts: tuple[str, str] = ("a red boat", "fog")) -> Prompt:
    """The shipped workflow, with its text encoder routed through the Calibration node."""
    prompt = flow.calibration(flow.prepare(server, "sd15", flow.CALIBRATE, session=session, seed=seed))
    calibration, loader = graph.find(prompt, "HSWQCalibration"), graph.find(prompt, "CheckpointLoaderSimple")
    prompt[calibration]["inputs"]["clip"] = [loader, 1]
    encoders = [entry for entry in prompt.values() if entry["class_type"] == "CLIPTextEncode"]
    for entry, text in zip(encoders, texts, strict=True):
        entry["inputs"].update(clip=[calibration, 1], text=text)
    return prompt


def without(prompt: Prompt) -> Prompt:
    """The same, with prompts encoded by the loader's own CLIP and the picture drawn without calibration."""
    changed = copy.deepcopy(prompt)
    calibration, loader = graph.find(prompt, "HSWQCalibration"), graph.find(prompt, "CheckpointLoaderSimple")
    del changed[calibration]
    for entry in changed.values():
        for name, value in entry["inputs"].items():
            if value in ([calibration, 0], [calibration, 1]):
                entry["inputs"][name] = [loader, value[1]]
    return changed


def session_file(server, name: str) -> Path:
    return server.output / "hswq_stats" / f"{name}_clip_l.pt"


@pytest.mark.compat
def test_prompts_are_recorded_and_add_up_and_the_picture_stays(server):
    prompt = workflow(server, "with_text")
    plain = server.client.run(without(prompt)).check()
    seen = server.client.run(prompt).check()
    files = [io.BytesIO(server.client.view(result.images()[0])) for result in (plain, seen)]
    pictures = [np.asarray(Image.open(file).convert("RGB")) for file in files]
    assert np.array_equal(*pictures)
    assert pictures[0].std() > 10
    session = load_session(session_file(server, "with_text"))
    assert session.calls == 2
    assert session.family == "CLIP"
    assert len(session.layers) == LAYERS
    assert {stats.in_calls for stats in session.layers.values()} == {2}
    server.client.run(workflow(server, "with_text", texts=("a lighthouse", "fog"))).check()
    grown = load_session(session_file(server, "with_text")).calls
    assert grown > 2


@pytest.mark.compat
def test_after_it_nothing_is_recorded_any_more(server):
    prompt = workflow(server, "text_once", texts=("a hill", "rain"))
    server.client.run(prompt).check()
    before = session_file(server, "text_once").read_bytes()
    server.client.run(without(workflow(server, "text_once", seed=3, texts=("a well", "snow")))).check()
    assert session_file(server, "text_once").read_bytes() == before


def test_its_file_is_converted_by_the_session(server):
    server.client.run(workflow(server, "text_file")).check()
    checkpoint = load_file(tiny.make("sd15-small"))
    state = {key.removeprefix(CLIP): tensor for key, tensor in checkpoint.items() if key.startswith(CLIP)}
    folder = server.output.parent / "models" / "text_encoders"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "recorded_clip_l.safetensors")
    inputs = {"file": "text_encoders/recorded_clip_l.safetensors", "format": "v1", "method": "hswq", "preset": "auto"}
    settings = {"session": "text_file_clip_l", "keep_ratio": 0.25}
    result = server.client.run({"1": {"class_type": "HSWQFileConverter", "inputs": {**inputs, **settings}}}).check()
    assert result.status == "success"
    (made,) = (server.output / "clip").glob("recorded_clip_l_hswq_r2_0.25_v1*.safetensors")
    dtypes = [tensor.dtype for key, tensor in load_file(made).items() if key.endswith("proj.weight") or ".fc" in key]
    assert dtypes.count(torch.float8_e4m3fn) > LAYERS // 2


@pytest.fixture
def clip(comfy, tmp_path):
    import comfy.sd

    checkpoint = load_file(tiny.make("sd15-small"))
    state = {key.removeprefix(CLIP): tensor for key, tensor in checkpoint.items() if key.startswith(CLIP)}
    save_file(state, tmp_path / "clip_l.safetensors")
    return comfy.sd.load_clip([str(tmp_path / "clip_l.safetensors")])


def encode(clip, text: str) -> torch.Tensor:
    return clip.encode_from_tokens(clip.tokenize(text))


@pytest.mark.compat
def test_statistics_are_those_of_plain_hooks(clip, tmp_path):
    from hswq.loader.calibration.text import calibrated_clip

    told: list[str] = []
    recorded = calibrated_clip(clip, tmp_path / "s.pt", told.append).clone()  # LoRA loaders clone
    layer = clip.cond_stage_model.clip_l.transformer.text_model.encoder.layers[3].mlp.fc2
    seen: list[torch.Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _module, args: seen.append(args[0].double().clone()))
    encoded = [encode(recorded, text) for text in ("a red boat", "fog over a hill")]
    handle.remove()
    stats = load_session(tmp_path / "s_clip_l.pt").layers["text_model.encoder.layers.3.mlp.fc2"]
    expected = torch.stack([x.abs().flatten(0, -2).mean(0) for x in seen]).mean(0)
    assert len(seen) == stats.in_calls == 2
    torch.testing.assert_close(stats.importance, expected, rtol=1e-5, atol=1e-7)
    assert torch.equal(encoded[0], encode(clip, "a red boat"))
    assert not layer._forward_hooks
    assert not layer._forward_pre_hooks
    assert load_session(tmp_path / "s_clip_l.pt").calls == 2  # the last encoding was by the plain CLIP
    assert told[-1].startswith("clip_l · 72 layers · 2 calls · saved ")


@pytest.mark.compat
def test_two_nodes_of_one_session_record_once_of_two_both(clip, tmp_path):
    from hswq.loader.calibration.text import calibrated_clip

    twice = clip
    for name in ("a", "a", "b"):
        twice = calibrated_clip(twice, tmp_path / f"{name}.pt", lambda _text: None)
    encode(twice, "a red boat")
    assert [load_session(tmp_path / f"{name}_clip_l.pt").calls for name in ("a", "b")] == [1, 1]


@pytest.mark.compat
def test_an_error_while_encoding_leaves_no_hooks(clip, tmp_path):
    from hswq.loader.calibration.text import calibrated_clip

    recorded = calibrated_clip(clip, tmp_path / "s.pt", lambda _text: None)
    with pytest.raises((KeyError, TypeError)):
        recorded.encode_from_tokens({"no such encoder": []})
    modules = clip.cond_stage_model.modules()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)
    assert not (tmp_path / "s_clip_l.pt").exists()


@pytest.mark.compat
def test_a_text_encoder_in_eight_bits_is_refused(clip, tmp_path):
    from hswq.loader.calibration.text import calibrated_clip

    layer = clip.cond_stage_model.clip_l.transformer.text_model.encoder.layers[0].mlp.fc1
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(LayerError, match=r"clip.*no text encoder in 16 bits.*disconnect clip"):
        calibrated_clip(clip, tmp_path / "s.pt", lambda _text: None)
