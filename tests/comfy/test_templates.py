"""The shipped workflows: what ComfyUI offers, what they name, and those without a family run in the real server."""

from __future__ import annotations

import io
import json
import urllib.request

import pytest
from hswq.hswq_core.calibration.prompts import shipped_prompts, turn
from hswq.hswq_core.calibration.session import load_session
from hswq.hswq_core.files.names import describe
from hswq.hswq_core.plan.budget import Budget
from PIL import Image
from rig import flow, graph, prompts, tiny
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.comfy

CLIP = "cond_stage_model.transformer."
KILOBYTES_OF_A_PICTURE = 60
STOCK = set(flow.STOCK.values())


def entry(prompt, class_type):
    return prompt[graph.find(prompt, class_type)]["inputs"]


@pytest.fixture(scope="module")
def shown(server):
    """{name: API prompt} of every template."""
    info = server.client.object_info()
    return {name: graph.to_prompt(flow.template(name), info) for name in flow.templates()}


@pytest.mark.compat
def test_all_are_offered_each_with_its_picture(server):
    names = flow.templates()
    offered = server.client.get("/workflow_templates")["ComfyUI-HSWQ"]
    assert sorted(offered) == names
    assert sorted(path.stem for path in flow.WORKFLOWS.glob("*.jpg")) == names
    for name in names:
        url = f"{server.url}/api/workflow_templates/ComfyUI-HSWQ/{name}.jpg"
        with urllib.request.urlopen(url) as reply:  # noqa: S310 - our own
            data = reply.read()
        with Image.open(io.BytesIO(data)) as picture:
            assert (picture.format, picture.width) == ("JPEG", picture.height)
        assert len(data) < KILOBYTES_OF_A_PICTURE * 1024


def test_every_job_is_there_for_every_family():
    jobs = (flow.CALIBRATE, flow.LOAD, flow.COMPARE)
    wanted = {f"{family}_{job}" for family in flow.FAMILIES for job in jobs}
    assert wanted | {flow.OVER_PROMPTS, "text_encoder_convert"} == set(flow.templates())


def test_every_one_has_a_note():
    for name in flow.templates():
        (note,) = (node for node in flow.template(name)["nodes"] if node["type"] == "MarkdownNote")
        assert "**Run**" in note["widgets_values"][0]


@pytest.mark.parametrize("family", flow.FAMILIES)
@pytest.mark.parametrize("job", [flow.LOAD, flow.COMPARE])
def test_the_file_to_load_is_the_one_that_calibrate_and_convert_writes(shown, family, job):
    wrote = shown[f"{family}_{flow.CALIBRATE}"]
    sampler, settings = entry(wrote, "KSampler"), entry(wrote, "HSWQConverter")
    (source,) = (e["inputs"][flow.FILE_INPUT[e["class_type"]]] for e in wrote.values() if e["class_type"] in STOCK)
    budget = Budget(settings["extra_percent"]).text
    name = f"{source.removesuffix('.safetensors')}_{describe(sampler['steps'], budget)}_{settings['format']}"
    opened = [e for e in shown[f"{family}_{job}"].values() if e["class_type"] in flow.STOCK]
    assert [e["inputs"][flow.FILE_INPUT[e["class_type"]]] for e in opened] == [f"{name}.safetensors"]


@pytest.mark.compat
def test_calibrate_over_prompts_draws_another_prompt_from_another_noise_each_time(server, models):
    prompt = flow.prepare(server, "sd15", flow.OVER_PROMPTS, session="over_prompts")
    assert "HSWQConverter" not in json.dumps(prompt)
    pictures = set()
    for index in range(3):
        queued = graph.set_input(prompt, "HSWQCalibrationPrompts", index=index)
        with server.client.listen() as heard:
            result = server.client.run(queued).check()
        assert f"{index + 1} of 128: {shipped_prompts()[index]}" in " ".join(heard.progress_text())
        (picture,) = result.images()
        pictures.add(server.client.view(picture))
    assert len(pictures) == 3
    assert load_session(server.output / "hswq_stats" / "over_prompts.pt").images == 3


def test_prompts_of_ones_own_go_round(server):
    node = prompts.node("HSWQCalibrationPrompts", prompts="a cat\n\n a dog \n", index=0)
    wired = {"prompts": node, **{f"show{i}": prompts.node("PreviewAny", source=["prompts", i]) for i in (0, 1)}}
    for index, text in [(0, "a cat"), (1, "a dog"), (2, "a cat")]:
        said = server.client.run(graph.set_input(wired, "prompts", index=index)).check().text()
        assert sorted(said) == sorted([text, str(turn(index, ("a cat", "a dog")).seed)])


@pytest.mark.parametrize("index", [-1, 2**32])
def test_no_index_out_of_range(server, index):
    node = prompts.node("HSWQCalibrationPrompts", prompts="", index=index)
    wired = {"prompts": node, "show": prompts.node("PreviewAny", source=["prompts", 0])}
    assert server.client.run(wired).status == "rejected"


@pytest.mark.compat
def test_text_encoder_convert_writes_a_file_for_load_clip(server):
    checkpoint = load_file(tiny.make("sd15-small"))
    state = {key.removeprefix(CLIP): tensor for key, tensor in checkpoint.items() if key.startswith(CLIP)}
    folder = server.base / "models" / "text_encoders"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "of_template.safetensors")
    prompt = graph.to_prompt(flow.template("text_encoder_convert"), server.client.object_info())
    prompt = graph.set_input(prompt, "HSWQFileConverter", file="text_encoders/of_template.safetensors", preset="auto")
    result = server.client.run(prompt).check()
    assert "quantized" in result.text()[-1]
    (made,) = (server.output / "clip").glob("of_template*.safetensors")
    assert made.name in str(server.client.object_info()["CLIPLoader"]["input"]["required"]["clip_name"])


@pytest.mark.compat
def test_compare_shows_what_fp8_changed_and_nothing_between_equals(server, models):
    inputs = {"file": f"diffusion_models/{models.flux()}", "format": "comfy", "method": "nearest", "preset": "auto"}
    before = set(server.output.rglob("*.safetensors"))
    server.client.run({"convert": prompts.node("HSWQFileConverter", **inputs, filename_prefix="compared")}).check()
    (made,) = set(server.output.rglob("*.safetensors")) - before
    same, prompt = models.flux(), flow.prepare(server, "flux", flow.COMPARE, seed=3)
    decibels = {}
    for file in (same, made.name):
        opened = flow.opening(prompt, file, "diffusion_models", stock=file == same)
        number = prompts.node("PreviewAny", source=[graph.find(opened, "HSWQCompare"), 3])
        result = server.client.run({**opened, "psnr": number}).check()
        decibels[file] = min(float(text) for text in result.text() if text.replace(".", "", 1).isdigit())
    assert decibels[same] == 100
    assert 20 < decibels[made.name] < 80
