"""The shipped workflows, run on small models, for the demo, the tests and the benchmarks.

Real weights are not available here, so file names are replaced by those of the rig's models and, where a
family's text encoder is too big, its prompts by random conditioning. Everything else runs as shipped.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reference_models.architectures import REFERENCES

from rig import graph, tiny
from rig.client import Prompt
from rig.pack import ROOT
from rig.server import ComfyServer

CALIBRATE, LOAD, COMPARE = "calibrate_and_convert", "load", "compare"
OVER_PROMPTS = "calibrate_over_prompts"  # one template, for all checkpoints
WORKFLOWS = ROOT / "workflows"
STOCK = {"HSWQLoader": "CheckpointLoaderSimple", "HSWQDiffusionModelLoader": "UNETLoader"}
FOLDER = {"HSWQLoader": "checkpoints", "HSWQDiffusionModelLoader": "diffusion_models"}
FILE_INPUT = {
    "HSWQLoader": "ckpt_name",
    "HSWQDiffusionModelLoader": "model_name",
    "CheckpointLoaderSimple": "ckpt_name",
    "UNETLoader": "unet_name",
}


@dataclass(frozen=True)
class Family:
    """Stand-ins for a family's files.

    name          as in its workflows
    kind          kind of the small random model, or of the trained one
    folder        the model folder it lies in
    vae           kind of the small VAE; None if the checkpoint has its own
    conditioning  inputs of RigConditioning; None if the checkpoint has a text encoder
    trained       a reference model: it understands captions, and its latents need no VAE
    """

    name: str
    kind: str
    folder: str
    vae: str | None = None
    conditioning: dict[str, int] | None = None
    trained: bool = False

    @property
    def file(self) -> Path:
        """The model's file."""
        return REFERENCES[self.kind].file if self.trained else tiny.make(self.kind)

    @property
    def file_name(self) -> str:
        """The name under which the loaders list it."""
        return f"{self.kind}-trained.safetensors" if self.trained else f"{self.kind}.safetensors"


FAMILIES = {
    family.name: family
    for family in (
        Family("sd15", "sd15-small", "checkpoints"),
        Family("sdxl", "sdxl-small", "checkpoints", "taesd", {"tokens": 77, "width": 2048, "pooled_width": 1280}),
        Family("flux", "flux-tiny", "diffusion_models", "taef", {"tokens": 12, "width": 768, "pooled_width": 768}),
        Family("zimage", "zimage", "diffusion_models", "taef", {"tokens": 8, "width": 2560, "pooled_width": 0}),
    )
}
# The reference models that every stock loader opens.
TRAINED = {"flux": Family("flux", "flux", "diffusion_models", trained=True)}


def templates() -> list[str]:
    """Names of all shipped workflows."""
    return sorted(path.stem for path in WORKFLOWS.glob("*.json"))


def template(name: str) -> dict[str, Any]:
    """A workflow of the repository, in UI format."""
    return dict(json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8")))


def shipped(family: str, job: str) -> dict[str, Any]:
    """The workflow for a family and a job, in UI format."""
    return template(job if job == OVER_PROMPTS else f"{family}_{job}")


def prepare(
    server: ComfyServer,
    name: str,
    job: str,
    *,
    size: int = 64,
    steps: int = 2,
    seed: int = 0,
    session: str = "",
    caption: str = "",
) -> Prompt:
    """A shipped workflow as an API prompt, for the small model of its family.

    size     of the picture in pixels, eight per latent pixel
    session  session name; "" keeps the workflow's own
    caption  drawn by the family's trained model; "" uses the random model with random conditioning
    """
    family, info = (TRAINED if caption else FAMILIES)[name], server.client.object_info()
    prompt = graph.to_prompt(shipped(family.name, job), info)
    wishes = {"width": size, "height": size, "steps": steps, "seed": seed}
    for entry in prompt.values():
        inputs = entry["inputs"]
        inputs |= {key: wish for key, wish in wishes.items() if not graph.is_link(inputs.get(key, ["", 0]))}
        if entry["class_type"] == "PrimitiveInt":  # the seed of both samplers
            inputs["value"] = seed
        if session and "session" in inputs:
            inputs["session"] = session
    prompt = _named(server, prompt, family)
    prompt = _captioned(prompt, caption) if family.trained else _conditioned(prompt, family)
    if family.vae is not None and family.folder == "checkpoints":
        prompt = _without_encoders(prompt, _vae(server, family.vae))
    return graph.drop_unused(_reporting(prompt), info)


def calibration(prompt: Prompt) -> Prompt:
    """Only the calibrated picture, with the converter bypassed."""
    gone = {"HSWQConverter", "PreviewAny"}
    return {key: copy.deepcopy(entry) for key, entry in prompt.items() if entry["class_type"] not in gone}


def conversion(server: ComfyServer, prompt: Prompt, **settings: Any) -> Prompt:
    """Only the converter, using existing statistics; `settings` are inputs of the node."""
    converted = graph.set_input(prompt, "HSWQConverter", **settings)
    del converted[graph.find(converted, "HSWQConverter")]["inputs"]["after"]
    del converted[graph.find(converted, "SaveImage")]
    return graph.drop_unused(converted, server.client.object_info())


def opening(prompt: Prompt, file: str, folder: str, *, stock: bool) -> Prompt:
    """A load workflow for a file in a model folder, with the matching HSWQ loader or ComfyUI's own."""
    shipped_loader = next(entry["class_type"] for entry in prompt.values() if entry["class_type"] in STOCK)
    ours = next(loader for loader, where in FOLDER.items() if where == folder)
    loader = STOCK[ours] if stock else ours
    extra = {"weight_dtype": "default"} if loader == "UNETLoader" else {}
    return graph.replace_node(prompt, shipped_loader, loader, **{FILE_INPUT[loader]: file}, **extra)


def _reporting(prompt: Prompt) -> Prompt:
    """Put the converter's report among the results, not only on its node."""
    convert = [key for key, entry in prompt.items() if entry["class_type"] == "HSWQConverter"]
    reports = {f"report of {key}": {"class_type": "PreviewAny", "inputs": {"source": [key, 1]}} for key in convert}
    return prompt | reports


def _named(server: ComfyServer, prompt: Prompt, family: Family) -> Prompt:
    """Replace the real file names with those of the small files."""
    model = server.add_model(family.folder, family.file, family.file_name)
    for entry in prompt.values():
        name = FILE_INPUT.get(entry["class_type"])
        if name is not None:
            entry["inputs"][name] = model
        if entry["class_type"] == "VAELoader" and not family.trained:
            entry["inputs"]["vae_name"] = _vae(server, str(family.vae))
    return prompt


def _vae(server: ComfyServer, kind: str) -> str:
    return server.add_model("vae", tiny.make(kind), f"rig-{kind}.safetensors")


def _conditioned(prompt: Prompt, family: Family) -> Prompt:
    if family.conditioning is None:
        return prompt
    texts = [key for key, entry in prompt.items() if entry["class_type"] == "CLIPTextEncode"]
    for seed, key in enumerate(texts, 1):
        prompt = graph.replace_node(prompt, key, "RigConditioning", **family.conditioning, seed=seed)
    return prompt


def _captioned(prompt: Prompt, caption: str) -> Prompt:
    """Use a reference model's own text encoder and picture code."""
    for key, entry in list(prompt.items()):
        if entry["class_type"] == "CLIPTextEncode":
            prompt = graph.replace_node(prompt, key, "RigCaption", caption=caption)
        elif entry["class_type"] == "VAEDecode":
            prompt = graph.replace_node(prompt, key, "RigPicture", samples=entry["inputs"]["samples"])
    return prompt


def _without_encoders(prompt: Prompt, vae: str) -> Prompt:
    """For a UNet-only checkpoint: use a separate VAE, and write a diffusion model."""
    changed = copy.deepcopy(prompt)
    changed["vae"] = {"class_type": "VAELoader", "inputs": {"vae_name": vae}}
    for entry in changed.values():
        if entry["class_type"] == "VAEDecode":
            entry["inputs"]["vae"] = ["vae", 0]
        if entry["class_type"] == "HSWQConverter":
            del entry["inputs"]["clip"], entry["inputs"]["vae"]
    return changed
