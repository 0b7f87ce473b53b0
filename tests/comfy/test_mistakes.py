"""The ten likeliest mistakes, made on purpose, and what the user is told, in the order of the README's list."""

from __future__ import annotations

import copy
import errno
import os
import shutil
from pathlib import Path

import pytest
from hswq.hswq_core.calibration.session import load_session
from rig import flow, graph, prompts
from rig.client import Prompt

pytestmark = pytest.mark.comfy


def workflow(server, **settings) -> Prompt:
    return flow.prepare(server, "flux", flow.CALIBRATE, **settings)


def calibrate(server, session: str, **settings) -> None:
    server.client.run(flow.calibration(workflow(server, session=session, **settings))).check()


def convert(server, session: str, **settings) -> str:
    """The report of a conversion."""
    prompt = flow.conversion(server, workflow(server), **{"session": session, "method": "hswq", **settings})
    return server.client.run(prompt).check().text()[-1]


def files(server) -> set[Path]:
    return {path for path in server.output.rglob("*") if path.is_file() and path.suffix != ".lock"}


def heard(server, prompt: Prompt) -> tuple[object, list[str]]:
    """The result, and the texts shown on nodes meanwhile."""
    with server.client.listen() as listener:
        result = server.client.run(prompt)
        return result, listener.progress_text()


def without_sampler(server, session: str) -> Prompt:
    """Calibration straight into the Converter."""
    prompt = flow.conversion(server, workflow(server, session=session))
    converter = prompt[graph.find(prompt, "HSWQConverter")]
    assert prompt[converter["inputs"]["model"][0]]["class_type"] == "HSWQCalibration"
    return prompt


def test_1_the_session_of_another_model(server):
    server.client.run(flow.calibration(flow.prepare(server, "sd15", flow.CALIBRATE, session="of_sd15"))).check()
    before = files(server)
    prompt = flow.conversion(server, workflow(server), session="of_sd15", method="hswq")
    result = server.client.run(prompt)
    assert "Session of_sd15: got a model with another layer layout" in result.errors[0]
    assert "another session name" in result.errors[0]
    assert files(server) == before


@pytest.mark.compat
def test_2_nothing_was_sampled(server):
    result = server.client.run(without_sampler(server, "unsampled"))
    assert (
        "Session unsampled: got a model that comes from HSWQ Calibration but has drawn nothing yet" in result.errors[0]
    )
    assert "Connect the model output of HSWQ Calibration to the sampler" in result.errors[0]


@pytest.mark.compat
def test_3_the_converter_runs_before_the_picture(server):
    """Both in one graph, nothing at ``after``: ComfyUI may convert first. Following the error makes it work."""
    prompt = workflow(server, session="too_early")
    converter = graph.find(prompt, "HSWQConverter")
    early = copy.deepcopy(prompt)
    del early[converter]["inputs"]["after"]
    alone = {key: early[key] for key in early if early[key]["class_type"] not in ("SaveImage", "VAEDecode")}
    result = server.client.run(graph.drop_unused(alone, server.client.object_info()))
    assert "the decoded picture to the Converter's 'after'" in result.errors[0]
    prompt = graph.set_input(prompt, converter, method="hswq")
    assert "quantized" in server.client.run(prompt).check().text()[-1]


@pytest.mark.compat
def test_4_a_v2_file_in_a_stock_loader(server):
    """Nothing can stop ComfyUI's own loader, so a warning appears on its node before the noise is drawn."""
    calibrate(server, "loaders")
    convert(server, "loaders", format="v2", filename_prefix="mistaken")
    name = next((server.output / "diffusion_models").glob("mistaken*_v2.safetensors")).name
    load = flow.prepare(server, "flux", flow.LOAD)
    wrong = flow.opening(load, name, "diffusion_models", stock=True)
    _, texts = heard(server, wrong)
    said = f"Use HSWQ Diffusion Model Loader: this loader misreads V2 files as noise ({name})."
    assert any(said in text for text in texts)
    assert said in server.log()
    right = flow.opening(load, name, "diffusion_models", stock=False)
    _, texts = heard(server, right)
    assert not any("misreads" in text for text in texts)


def test_4_an_unquantized_file_in_the_hswq_loader(server):
    load = flow.opening(
        flow.prepare(server, "flux", flow.LOAD), "flux-tiny.safetensors", "diffusion_models", stock=False
    )
    result = server.client.run(load)
    assert "flux-tiny.safetensors: got no float8_e4m3fn weight" in result.errors[0]


@pytest.mark.compat
def test_5_a_lora_that_is_merged_into_the_file(server, models):
    """LoRA before the Converter: the report warns against adding it again. Not connected: no warning."""
    calibrate(server, "with_lora")
    prompt = flow.conversion(server, workflow(server), session="with_lora", method="hswq")
    lora = prompts.node("LoraLoaderModelOnly", model=None, lora_name=models.lora("flux-tiny"), strength_model=1.0)
    source = prompt[graph.find(prompt, "HSWQConverter")]["inputs"]["model"][0]
    lora["inputs"]["model"] = [source, 0]
    merged = prompts.insert(prompt, "lora", lora, after=source)
    report = server.client.run(merged).check().text()[-1]
    assert "LoRAs or merges of the connected model are in the file" in report
    assert "do not add them again" in report
    assert "do not add them again" not in convert(server, "with_lora", filename_prefix="without_lora")


def test_6_the_disk_is_full(server, comfy, made, monkeypatch, tmp_path):
    """In this process: the system raises ENOSPC when the file is written."""
    from hswq.hswq_core.errors import HSWQError

    real = os.fsync

    def full(handle: int) -> None:
        if os.fstat(handle).st_size > 1_000_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(HSWQError, match="No space left on device"):
        made(comfy, "flux-tiny", "comfy", filename_prefix="full_disk")


def test_7_an_old_comfyui(comfy, monkeypatch):
    import comfyui_version
    from hswq.loader.support import require_comfyui

    monkeypatch.setattr(comfyui_version, "__version__", "0.3.64")
    with pytest.raises(ImportError, match=r"got 0\.3\.64, expected 0\.18\.2 or newer\. Update ComfyUI"):
        require_comfyui()


def test_8_no_gpu(server):
    calibrate(server, "on_cpu", steps=6)
    prompt = flow.conversion(server, workflow(server), session="on_cpu", method="model_aware", filename_prefix="cpu")
    result, texts = heard(server, prompt)
    result.check()
    assert any("No GPU found: model_aware runs the model on the CPU" in text for text in texts)


def test_9_too_few_samples(server):
    """Fewer samples than model_aware can split, and enough of them but from a single prompt."""
    calibrate(server, "few_calls", steps=2)
    prompt = flow.conversion(server, workflow(server), session="few_calls", method="model_aware")
    result = server.client.run(prompt)
    assert "got 2 model calls, expected at least 4, better 128" in result.errors[0]
    assert "Generate once more with the Calibration node" in result.errors[0]
    calibrate(server, "one_prompt", steps=6)
    report = convert(server, "one_prompt", method="model_aware", filename_prefix="one")
    assert "The session shows one prompt" in report
    assert "With 12 or more of your own the file gets better" in report


def test_10_calibration_is_bypassed(server):
    """A bypassed node is not in the prompt at all: without a session, the Converter says so."""
    prompt = workflow(server, session="passed_by")
    bypassed = prompts_without(prompt, "HSWQCalibration")
    result = server.client.run(graph.set_input(bypassed, "HSWQConverter", method="hswq"))
    assert "passed_by.pt: got no such file" in result.errors[0]
    assert "switched on and not bypassed" in result.errors[0]
    calibrate(server, "switched_off")
    path = server.output / "hswq_stats" / "switched_off.pt"
    shutil.copy(path, path.with_name("passed_by.pt"))
    server.client.run(graph.set_input(bypassed, "HSWQConverter", method="hswq")).check()
    assert load_session(path.with_name("passed_by.pt")).calls == load_session(path).calls


def prompts_without(prompt: Prompt, kind: str) -> Prompt:
    """Bypass as the page does it: nodes that used this node's model get its input model."""
    key = graph.find(prompt, kind)
    source = prompt[key]["inputs"]["model"]
    rest = {name: copy.deepcopy(node) for name, node in prompt.items() if name != key}
    for node in rest.values():
        node["inputs"] = {name: source if value == [key, 0] else value for name, value in node["inputs"].items()}
    return rest
