"""HSWQ Report in the real server: calibrate, convert and report in one graph; sessions, others' files, refusals."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hswq.hswq_core.calibration.session import load_session
from PIL import Image
from rig import flow
from rig.client import Prompt, Result
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.comfy

BACKGROUND = (0x20, 0x20, 0x20)


def report(**inputs: object) -> Prompt:
    """The node alone, with its table shown."""
    return {
        "report": {"class_type": "HSWQReport", "inputs": {"session": "", "file": "none", **inputs}},
        "shown": {"class_type": "PreviewAny", "inputs": {"source": ["report", 1]}},
    }


def picture(server, result: Result) -> np.ndarray:
    """The picture the node shows; it must not be blank, and must have the right size."""
    (image,) = result.outputs["report"]["images"]
    found = Image.open(io.BytesIO(server.client.view(image))).convert("RGB")
    assert found.size == (1600, 1200)
    pixels = np.asarray(found)
    assert tuple(pixels[2, 2]) == BACKGROUND
    assert 0.1 < (pixels != BACKGROUND).any(-1).mean() < 0.95
    return pixels


def table(result: Result) -> str:
    (text,) = result.outputs["shown"]["text"]
    return str(text)


def refused(server, *words: str, **inputs: object) -> None:
    result = server.client.run(report(**inputs))
    assert result.status in ("error", "rejected")
    for word in words:
        assert word in " ".join(result.errors)


def calibrate(server, session: str, *, seed: int = 0) -> None:
    workflow = flow.prepare(server, "flux", flow.CALIBRATE, session=session, seed=seed)
    server.client.run(flow.calibration(workflow)).check()


@pytest.fixture(scope="module")
def converted(server) -> Path:
    """A file made with method hswq."""
    calibrate(server, "to_report")
    workflow = flow.prepare(server, "flux", flow.CALIBRATE, session="to_report")
    before = set(server.output.rglob("*.safetensors"))
    server.client.run(flow.conversion(server, workflow, session="to_report", method="hswq")).check()
    (made,) = set(server.output.rglob("*.safetensors")) - before
    return made


@pytest.mark.compat
def test_one_graph_calibrates_converts_and_reports(server):
    workflow = flow.prepare(server, "flux", flow.CALIBRATE, session="whole_way", steps=4)
    (converter,) = [key for key, node in workflow.items() if node["class_type"] == "HSWQConverter"]
    result = server.client.run({**workflow, **report(path=[converter, 0])}).check()
    picture(server, result)
    text = table(result)
    assert "method model_aware 3pct" in text
    assert "change of the output, %" in text
    assert "with every layer in 8 bits" in text


@pytest.mark.compat
def test_a_file_by_its_name(server, converted):
    result = server.client.run(report(file=f"diffusion_models/{converted.name}")).check()
    picture(server, result)
    assert f"## {converted.name}" in table(result)
    assert "method hswq 0.25" in table(result)


@pytest.mark.compat
def test_a_session_and_again_when_it_has_grown(server):
    calibrate(server, "growing")
    prompt = report(session="growing")
    first = server.client.run(prompt).check()
    few = picture(server, first)
    assert " layers, 2 calls, 1 images" in table(first)
    assert "Too few points to tell" in table(first)
    assert "report" in server.client.run(prompt).check().cached
    calibrate(server, "growing", seed=1)
    second = server.client.run(prompt).check()
    assert "4 calls, 2 images" in table(second)
    assert "from 2 to 4" in table(second)
    assert (picture(server, second) != few).any()


def test_calibration_remembers_how_the_session_stood_at_each_save(server):
    for seed in (0, 1):
        calibrate(server, "remembered", seed=seed)
    session = load_session(server.output / "hswq_stats" / "remembered.pt")
    assert [(point.calls, point.images) for point in session.history] == [(2, 1), (4, 2)]
    names = sorted(session.layers)
    assert session.history[-1].sensitivity.tolist() == [
        pytest.approx(session.layers[name].sensitivity, rel=1e-6) for name in names
    ]
    assert session.history[0].level.ne(session.history[1].level).any()


def test_a_foreign_file_is_told_by_its_tensors(server, converted):
    made = load_file(converted)
    theirs = {key: tensor for key, tensor in made.items() if not key.endswith("comfy_quant")}
    save_file(theirs, converted.with_name("foreign.safetensors"))
    result = server.client.run(report(file="diffusion_models/foreign.safetensors")).check()
    picture(server, result)
    assert "made by another tool" in table(result)
    assert "F8_E4M3" in table(result)


@pytest.mark.compat
def test_another_file_of_the_same_name_is_reported_anew(server, converted):
    target = converted.with_name("replaced.safetensors")
    shutil.copy(converted, target)
    prompt = report(file=f"diffusion_models/{target.name}")
    assert "method hswq" in table(server.client.run(prompt).check())
    save_file({"a.weight": torch.ones(8, 8).to(torch.float8_e4m3fn)}, target)
    assert "1 layers in FP8" in table(server.client.run(prompt).check())


def test_the_path_goes_before_the_file_and_the_file_before_the_session(server, converted):
    other = f"diffusion_models/{converted.name}"
    shutil.copy(converted, converted.with_name("first.safetensors"))
    result = server.client.run(report(session="gone", file=other, path=str(converted.with_name("first.safetensors"))))
    assert "## first.safetensors" in table(result.check())
    assert f"## {converted.name}" in table(server.client.run(report(session="gone", file=other)).check())


def test_what_cannot_be_reported_is_named(server, models, converted, tmp_path):
    refused(server, f"File {models.flux()}", "no FP8 weight", file=f"diffusion_models/{models.flux()}")
    refused(server, "gone.safetensors", file="diffusion_models/gone.safetensors")
    refused(server, "neither a session nor a file")
    refused(server, "never_made.pt", "no such file", session="never_made")
    refused(server, "Session name", session="../elsewhere")
    shutil.copy(converted, tmp_path / "outside.safetensors")
    plan = converted.with_suffix(".plan.json")
    for path in (
        tmp_path / "outside.safetensors",
        converted.parent / ".." / ".." / ".." / tmp_path.relative_to("/") / "outside.safetensors",
        plan,
        converted.with_name("gone.safetensors"),
        converted.parent,
    ):
        refused(server, "path", "in ComfyUI's output folder", path=str(path))
    assert plan.is_file()
