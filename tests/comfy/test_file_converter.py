"""HSWQ File Converter in the real server: what it writes, where the file opens, what it refuses."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from hswq.hswq_core.files.checkpoint import FileSource
from PIL import Image
from rig import flow, prompts, tiny
from rig.client import Prompt
from rig.wait import until
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.comfy

CLIP = "cond_stage_model.transformer."


def prompt(file: str, **settings: object) -> Prompt:
    inputs = {"file": file, "format": "comfy", "method": "nearest", "preset": "auto", **settings}
    return {"convert": {"class_type": "HSWQFileConverter", "inputs": inputs}}


def files_in(server) -> set[Path]:
    return {path for path in server.output.rglob("*") if path.is_file() and path.suffix != ".lock"}


def convert(server, file: str, **settings: object) -> Path:
    """The new file; there must be exactly one, with its plan beside it."""
    before = files_in(server)
    server.client.run(prompt(file, **settings)).check()
    made, plan = sorted(files_in(server) - before, key=lambda path: path.suffix, reverse=True)
    assert plan.name == f"{made.stem}.plan.json"
    return made


def refused(server, file: str, *words: str, **settings: object) -> None:
    before = files_in(server)
    result = server.client.run(prompt(file, **settings))
    assert result.status in ("error", "rejected")
    for word in words:
        assert word in " ".join(result.errors)
    assert files_in(server) == before


def picture(server, workflow: Prompt) -> np.ndarray:
    (image,) = server.client.run(workflow).check().images()
    return np.asarray(Image.open(io.BytesIO(server.client.view(image))).convert("RGB")).astype(float)


@pytest.mark.parametrize("name", [pytest.param("comfy", marks=pytest.mark.compat), "v1", "v2"])
def test_a_diffusion_model_opens_in_its_loader_and_draws(server, models, name):
    made = convert(server, f"diffusion_models/{models.flux()}", format=name)
    assert made.parent.name == "diffusion_models"
    assert made.name.startswith(f"flux-tiny_nearest_{name}")
    load = flow.prepare(server, "flux", flow.LOAD, seed=7)
    ours = picture(server, flow.opening(load, made.name, "diffusion_models", stock=name != "v2"))
    original = picture(server, flow.opening(load, models.flux(), "diffusion_models", stock=True))
    assert 0 < np.abs(ours - original).mean() < 8
    assert original.std() > 10


def test_learned_rounding_is_another_file_and_leaves_nothing_else(server, models):
    file = f"diffusion_models/{models.flux()}"
    learned = load_file(convert(server, file, method="learned", format="v2"))
    nearest = load_file(convert(server, file, method="nearest", format="v2", filename_prefix="beside"))
    assert list(learned) == list(nearest)
    codes = [key for key, tensor in nearest.items() if tensor.dtype == torch.float8_e4m3fn]
    assert any(not torch.equal(learned[key].view(torch.uint8), nearest[key].view(torch.uint8)) for key in codes)
    assert all(torch.equal(learned[key], nearest[key]) for key in nearest if key not in codes)


def test_a_checkpoint_keeps_text_encoder_and_vae(server, models):
    made = convert(server, f"checkpoints/{models.sd15()}", format="v2")
    assert made.parent.name == "checkpoints"
    ours, source = FileSource(made), FileSource(tiny.make("sd15-small"))
    others = [key for key in source.entries if not key.startswith("model.diffusion_model.")]
    assert len(others) > 200
    assert all(torch.equal(ours.read(key), source.read(key)) for key in others)


@pytest.mark.compat
def test_by_a_session_as_the_converter_does_it(server, models):
    """Same weights, same statistics, same method: the same tensors."""
    workflow = flow.prepare(server, "flux", flow.CALIBRATE, session="of_file")
    server.client.run(flow.calibration(workflow)).check()
    before = files_in(server)
    server.client.run(flow.conversion(server, workflow, session="of_file", method="hswq", format="v2")).check()
    (expected,) = (path for path in files_in(server) - before if path.suffix == ".safetensors")
    made = convert(server, f"diffusion_models/{models.flux()}", method="hswq", session="of_file", format="v2")
    ours, theirs = load_file(made), load_file(expected)
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key].view(torch.uint8), theirs[key].view(torch.uint8)) for key in ours)
    assert FileSource(made).metadata == FileSource(expected).metadata


@pytest.mark.compat
def test_a_text_encoder_goes_where_load_clip_finds_it(server, models):
    checkpoint = load_file(tiny.make("sd15-small"))
    state = {key.removeprefix(CLIP): tensor for key, tensor in checkpoint.items() if key.startswith(CLIP)}
    folder = server.output.parent / "models" / "text_encoders"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "tiny_clip_l.safetensors")
    made = convert(server, "text_encoders/tiny_clip_l.safetensors", format="v1")
    assert made.parent.name == "clip"
    assert made.name in str(server.client.object_info()["CLIPLoader"]["input"]["required"]["clip_name"])
    plain = prompts.sd15(models.sd15(), text="a red boat")
    loaded = {**plain, "clip": prompts.node("CLIPLoader", clip_name=made.name, type="stable_diffusion")}
    for key in ("positive", "negative"):
        loaded[key] = prompts.node("CLIPTextEncode", clip=["clip", 0], text=plain[key]["inputs"]["text"])
    ours, original = picture(server, loaded), picture(server, plain)
    assert 0 < np.abs(ours - original).mean() < 8


def test_what_is_wrong_is_said_and_nothing_is_left(server, models):
    flux = f"diffusion_models/{models.flux()}"
    refused(server, flux, "session", "got none", "learned or nearest", method="hswq")
    refused(server, flux, "never_made.pt", method="hswq", session="never_made")
    refused(server, flux, "Session name", session="../elsewhere")
    refused(server, flux, "filename_prefix", filename_prefix="../../elsewhere")
    refused(server, "diffusion_models/gone.safetensors", "gone.safetensors")
    refused(server, "vae/../checkpoints/x.safetensors", "x.safetensors")


def test_an_fp8_file_is_no_source(server, models):
    made = convert(server, f"diffusion_models/{models.flux()}", format="v1", filename_prefix="again")
    refused(server, f"diffusion_models/{made.name}", "already FP8", "original FP16/BF16 file")


def test_cancel_leaves_nothing(server, models):
    file = f"checkpoints/{models.sdxl()}"
    before = files_in(server)
    with server.client.listen() as heard:
        queued = server.client.submit(prompt(file, filename_prefix="cancelled"))
        until(lambda: any("Rounding" in text for text in heard.progress_text()))
        server.client.interrupt()
        result = server.client.wait(queued)
    assert result.status == "interrupted"
    assert files_in(server) == before
