"""HSWQ Compare in the real server: what it shows, what it outputs, what it refuses."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
from PIL import Image
from rig import flow
from rig.client import Prompt, Result

pytestmark = pytest.mark.comfy

GREY, DARKER, BLACK = 0x808080, 0x767676, 0  # ten steps apart


def empty(color: int, count: int = 1, **size: int) -> dict[str, object]:
    inputs = {"width": 128, "height": 96, **size, "batch_size": count, "color": color}
    return {"class_type": "EmptyImage", "inputs": inputs}


def compared(reference: dict[str, object], candidate: dict[str, object], **settings: object) -> Prompt:
    inputs = {"reference": ["reference", 0], "candidate": ["candidate", 0], **settings}
    return {
        "reference": reference,
        "candidate": candidate,
        "compare": {"class_type": "HSWQCompare", "inputs": inputs},
    }


def with_outputs(prompt: Prompt) -> Prompt:
    """All outputs shown by ComfyUI's own nodes."""
    images = {
        name: {"class_type": "PreviewImage", "inputs": {"images": ["compare", index]}}
        for index, name in enumerate(["picture", "flicker"])
    }
    values = {
        name: {"class_type": "PreviewAny", "inputs": {"source": ["compare", index]}}
        for index, name in enumerate(["report", "psnr", "ssim"], 2)
    }
    return {**prompt, **images, **values}


def shown(server, result: Result, node: str) -> list[np.ndarray]:
    views = [server.client.view(image) for image in result.outputs[node]["images"]]
    return [np.asarray(Image.open(io.BytesIO(view)).convert("RGB")) for view in views]


def value(result: Result, node: str) -> str:
    (text,) = result.outputs[node]["text"]
    return text


@pytest.mark.compat
def test_the_node_shows_the_worst_pair_and_the_verdict(server):
    with server.client.listen() as heard:
        result = server.client.run(with_outputs(compared(empty(GREY, 2), empty(DARKER, 2)))).check()
    (preview,) = shown(server, result, "compare")
    assert preview.shape[1] == 3 * 256 + 16  # 128 enlarged twofold, and two gaps
    assert tuple(preview[-1, 10]) == (0x80, 0x80, 0x80)
    assert tuple(preview[-1, 270]) == (0x76, 0x76, 0x76)
    (picture,) = shown(server, result, "picture")
    assert np.array_equal(picture, preview)
    text = heard.progress_text()[-1]
    assert text.startswith("2 pictures: mean PSNR 28.1 dB")  # 20·log10(255 / 10)
    assert "Verdict: details differ." in text
    assert value(result, "report").startswith(text)
    assert float(value(result, "psnr")) == pytest.approx(20 * math.log10(25.5), abs=0.01)
    assert 0.9 < float(value(result, "ssim")) < 1


def test_flicker_is_reference_and_candidate_in_turn(server):
    result = server.client.run(with_outputs(compared(empty(GREY, 2), empty(DARKER, 2)))).check()
    frames = shown(server, result, "flicker")
    assert [frame.shape for frame in frames] == [(96, 128, 3)] * 4
    assert [frame.min() for frame in frames] == [frame.max() for frame in frames] == [0x80, 0x76, 0x80, 0x76]


def test_the_amplification_is_the_widgets(server):
    """Ten steps amplified 25.5 times span the whole range: the brightest colour; unamplified, they are almost black."""
    for amplify, bright in ((25.5, True), (1.0, False)):
        result = server.client.run(compared(empty(GREY), empty(DARKER), amplify=amplify)).check()
        (preview,) = shown(server, result, "compare")
        assert (preview[-1, -1].astype(int).sum() > 600) == bright


def test_a_black_picture_is_said_to_be_black(server):
    with server.client.listen() as heard:
        server.client.run(compared(empty(GREY), empty(BLACK))).check()
    assert "Verdict: broken: picture 1 is black, its reference is not." in heard.progress_text()[-1]


@pytest.mark.parametrize(
    ("candidate", "words"),
    [
        (empty(GREY, 3), ["got 3 pictures", "expected 1 picture of 128 × 96", "RepeatImageBatch"]),
        (empty(GREY, width=96), ["got 1 picture of 96 × 96", "128 × 96", "same prompts, seeds, size"]),
    ],
    ids=["count", "size"],
)
def test_what_does_not_match_is_refused(server, candidate, words):
    result = server.client.run(compared(empty(GREY), candidate))
    assert result.status == "error"
    assert all(word in result.errors[0] for word in ["SettingError", *words])


def test_an_amplification_out_of_range_is_refused_when_queued(server):
    assert server.client.run(compared(empty(GREY), empty(DARKER), amplify=0.5)).status == "rejected"


def test_alpha_against_no_alpha_is_refused(server):
    prompt = compared(empty(GREY), {"class_type": "JoinImageWithAlpha", "inputs": {}})
    mask = {"class_type": "SolidMask", "inputs": {"value": 0.0, "width": 128, "height": 96}}
    prompt["candidate"]["inputs"] = {"image": ["reference", 0], "alpha": ["mask", 0]}
    result = server.client.run({**prompt, "mask": mask})
    assert result.status == "error"
    assert "128 × 96 in 4 channels, expected 1 picture of 128 × 96 in 3 channels" in result.errors[0]


def test_a_models_picture_beside_that_of_its_fp8_file(server, models):
    """A workflow as people build it: both loaders, the same prompt and seed, compared."""
    source = models.flux()
    inputs = {"file": f"diffusion_models/{source}", "format": "v1", "method": "nearest", "preset": "auto"}
    convert = {"class_type": "HSWQFileConverter", "inputs": {**inputs, "filename_prefix": "to_compare"}}
    server.client.run({"convert": convert}).check()
    (made,) = server.output.rglob("to_compare*.safetensors")
    load = flow.prepare(server, "flux", flow.LOAD, seed=3)
    prompt: Prompt = {}
    for name, file, stock in (("a", source, True), ("b", made.name, False)):
        prompt |= renamed(flow.opening(load, file, "diffusion_models", stock=stock), name)
    decoded = sorted(key for key, node in prompt.items() if node["class_type"] == "VAEDecode")
    links = {"reference": [decoded[0], 0], "candidate": [decoded[1], 0]}
    prompt["compare"] = {"class_type": "HSWQCompare", "inputs": links}
    result = server.client.run(with_outputs(prompt)).check()
    frames = shown(server, result, "flicker")
    saved = [key for key, node in prompt.items() if node["class_type"] == "SaveImage"]
    for frame, key in zip(frames, sorted(saved), strict=True):
        (own,) = shown(server, result, key)
        assert np.array_equal(frame, own)
    assert not np.array_equal(*frames)
    root_mean_square = np.sqrt(np.square((frames[0].astype(float) - frames[1]) / 255).mean())
    unrounded = 10 ** (-float(value(result, "psnr")) / 20)
    assert 0 < unrounded == pytest.approx(root_mean_square, abs=1 / 255)


def renamed(prompt: Prompt, name: str) -> Prompt:
    """The same nodes under other ids."""
    return {
        f"{name}_{key}": {
            **node,
            "inputs": {
                slot: [f"{name}_{given[0]}", given[1]] if isinstance(given, list) else given
                for slot, given in node["inputs"].items()
            },
        }
        for key, node in prompt.items()
    }
