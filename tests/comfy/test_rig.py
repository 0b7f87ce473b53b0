"""The rig itself: a real server starts, knows our nodes and draws; workflows convert."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image
from rig import graph, prompts, tiny
from rig.client import Client, ClientError, Prompt
from rig.server import ComfyServer, ServerError

pytestmark = pytest.mark.comfy


def picture(client: Client, prompt: Prompt) -> np.ndarray:
    """The single picture that a prompt draws, [height, width, 3], 0..255."""
    (image,) = client.run(prompt).check().images()
    return np.asarray(Image.open(io.BytesIO(client.view(image))).convert("RGB"))


def lively(pixels: np.ndarray) -> bool:
    """A NaN picture comes out black."""
    return pixels.shape == (64, 64, 3) and pixels.std() > 5


@pytest.mark.compat
def test_the_server_offers_the_test_nodes(server):
    assert {"RigConditioning", "RigTrouble", "RigHooks"} <= set(server.client.object_info())


@pytest.mark.compat
def test_the_pack_was_imported_without_an_error(server):
    assert "IMPORT FAILED" not in server.log()


def test_sd15_draws(server, models):
    assert lively(picture(server.client, prompts.sd15(models.sd15())))


def test_flux_draws(server, models):
    assert lively(picture(server.client, prompts.flux(models.flux(), models.taef())))


@pytest.mark.slow
def test_sdxl_and_zimage_draw(server, models):
    assert lively(picture(server.client, prompts.sdxl(models.sdxl(), models.taesd())))
    assert lively(picture(server.client, prompts.zimage(models.zimage(), models.taef())))


@pytest.mark.parametrize("kind", ["flux-tiny", "sd15-small"])
def test_a_lora_changes_the_picture(server, models, kind):
    flux = kind == "flux-tiny"
    plain = prompts.flux(models.flux(), models.taef()) if flux else prompts.sd15(models.sd15())
    lora = {"model": ["model", 0], "lora_name": models.lora(kind), "strength_model": 1.0}
    changed = prompts.insert(plain, "lora", prompts.node("LoraLoaderModelOnly", **lora))
    before = len(server.log())
    difference = picture(server.client, changed).astype(int) - picture(server.client, plain)
    assert np.abs(difference).mean() > 2
    assert "lora key not loaded" not in server.log()[before:]


def test_an_invalid_prompt_is_rejected_with_its_node(server):
    wrong = {"1": prompts.node("RigConditioning", tokens=0, width=8, pooled_width=0, seed=0)}
    result = server.client.run(wrong | {"2": prompts.node("RigHooks", after=["1", 0])})
    assert result.status == "rejected"
    assert "smaller than min" in result.node_errors["1"]["errors"][0]["message"]
    with pytest.raises(ClientError, match=r"RigConditioning.*tokens"):
        result.check()


def trouble(models, **settings) -> Prompt:
    node = prompts.node("RigTrouble", **({"model": ["model", 0], "seconds": 0.5} | settings))
    return prompts.insert(prompts.flux(models.flux(), models.taef(), steps=20), "trouble", node)


def test_an_error_in_the_model_is_reported(server, models):
    result = server.client.run(trouble(models, mode="raise", at=2))
    assert result.status == "error"
    assert "RuntimeError: rig trouble in model call 2" in result.errors[0]


def test_interrupt_ends_a_running_prompt(server, models):
    client = server.client
    with client.listen() as heard:
        prompt_id = client.submit(trouble(models, mode="slow", at=1))
        heard.wait_for("progress")
        client.interrupt()
        result = client.wait(prompt_id, timeout=60)
    assert result.status == "interrupted"


def test_an_unchanged_prompt_is_cached(server, models):
    prompt = prompts.flux(models.flux(), models.taef(), seed=11)
    server.client.run(prompt).check()
    assert "sampler" in server.client.run(prompt).check().cached


@pytest.mark.compat
def test_no_hooks_are_left_without_our_nodes(server, models):
    hooks = {"hooks": prompts.node("RigHooks", after=["sampler", 0])}
    result = server.client.run(prompts.flux(models.flux(), models.taef()) | hooks).check()
    assert result.text() == ["0"]


def test_a_server_that_cannot_start_says_why(tmp_path):
    server = ComfyServer(base=tmp_path / "base", args=["--no-such-switch"])
    with pytest.raises(ServerError, match="no-such-switch"):
        server.start()


# ----- workflows


def saved(node_id: int, kind: str, values=(), inputs=(), outputs=(), mode: int = 0) -> dict:
    """A node as the page saves it; inputs: (name, type, link), outputs: types."""
    return {
        "id": node_id,
        "type": kind,
        "mode": mode,
        "inputs": [{"name": n, "type": t, "link": link} for n, t, link in inputs],
        "outputs": [{"type": kind} for kind in outputs],
        "widgets_values": list(values),
    }


def workflow(lora_mode: int = 0) -> dict:
    """Loader -> LoRA -> Reroute -> KSampler, with a PrimitiveNode for the steps and a Note."""
    return {
        "nodes": [
            saved(1, "CheckpointLoaderSimple", ["m.safetensors"], (), ["MODEL", "CLIP", "VAE"]),
            saved(2, "LoraLoader", ["l", 0.5, 0.25], [("model", "MODEL", 1), ("clip", "CLIP", 2)],
                  ["MODEL", "CLIP"], mode=lora_mode),
            saved(3, "Reroute", [], [("", "*", 3)], ["*"]),
            saved(4, "CLIPTextEncode", ["a cat"], [("clip", "CLIP", 4)], ["CONDITIONING"]),
            saved(5, "EmptyLatentImage", [64, 32, 1], (), ["LATENT"]),
            saved(6, "KSampler", [7, "fixed", 20, 8.0, "euler", "normal", 1.0],
                  [("model", "MODEL", 5), ("positive", "CONDITIONING", 6),
                   ("negative", "CONDITIONING", 7), ("latent_image", "LATENT", 8),
                   ("steps", "INT", 9)], ["LATENT"]),
            saved(7, "PrimitiveNode", [3, "fixed"], (), ["INT"]),
            saved(8, "Note", ["read me"]),
        ],
        "links": [
            [1, 1, 0, 2, 0, "MODEL"], [2, 1, 1, 2, 1, "CLIP"], [3, 2, 0, 3, 0, "*"],
            [4, 2, 1, 4, 0, "CLIP"], [5, 3, 0, 6, 0, "MODEL"], [6, 4, 0, 6, 1, "CONDITIONING"],
            [7, 4, 0, 6, 2, "CONDITIONING"], [8, 5, 0, 6, 3, "LATENT"], [9, 7, 0, 6, 4, "INT"],
        ],
    }  # fmt: skip


def test_a_workflow_becomes_a_prompt(server):
    prompt = graph.to_prompt(workflow(), server.client.object_info())
    assert sorted(prompt) == ["1", "2", "4", "5", "6"]
    assert prompt["6"]["inputs"] == {
        "seed": 7, "steps": 3, "cfg": 8.0, "sampler_name": "euler", "scheduler": "normal",
        "denoise": 1.0, "model": ["2", 0], "positive": ["4", 0], "negative": ["4", 0],
        "latent_image": ["5", 0],
    }  # fmt: skip


def test_a_bypassed_node_passes_its_inputs_on(server):
    prompt = graph.to_prompt(workflow(graph.BYPASSED), server.client.object_info())
    assert prompt["6"]["inputs"]["model"] == ["1", 0]
    assert prompt["4"]["inputs"]["clip"] == ["1", 1]


def test_a_muted_node_cuts_its_links(server):
    prompt = graph.to_prompt(workflow(graph.MUTED), server.client.object_info())
    assert "model" not in prompt["6"]["inputs"]


def test_an_unknown_node_is_named():
    with pytest.raises(graph.GraphError, match="NoSuchNode"):
        graph.to_prompt({"nodes": [saved(1, "NoSuchNode")], "links": []}, {})


def test_prompts_are_changed_in_copies():
    prompt = prompts.sd15("a")
    changed = graph.set_input(prompt, "KSampler", steps=9)
    assert (prompt["sampler"]["inputs"]["steps"], changed["sampler"]["inputs"]["steps"]) == (2, 9)
    with pytest.raises(graph.GraphError, match=r"step.*steps"):
        graph.set_input(prompt, "KSampler", step=9)


# ----- models, in process


def test_a_model_samples_in_process(comfy):
    latent = comfy.sample(comfy.load_model(tiny.make("flux-tiny")))
    assert latent.shape == (1, 16, 8, 8)
    assert latent.isfinite().all()
    assert latent.std() > 0


def test_a_wrong_option_names_the_right_ones():
    with pytest.raises(tiny.TinyError, match=r"hiden.*hidden"):
        tiny.make("flux-tiny", hiden=128)
