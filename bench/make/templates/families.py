"""One row for each family: its loaders, its prompts, its sampler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rig.prompts import node

Entry = dict[str, Any]
POSITIVE = "a lighthouse on a rocky coast at dusk, warm light in the windows, waves below, detailed oil painting"
NEGATIVE = "blurry, low quality"


@dataclass(frozen=True)
class Graph:
    """One family's graph.

    title      the family's usual spelling
    loaders    the stock loader nodes by key; the MODEL comes from "model"
    opener     the HSWQ loader of the file that "calibrate and convert" writes
    text       (CLIP source, VAE source), as links
    latent     the empty latent node
    shift      a node between MODEL and sampler, or None
    guidance   a node between prompt and sampler, or None
    negative   a second prompt (True), or the first one zeroed out
    sampler    what differs from KSampler's defaults
    """

    title: str
    loaders: dict[str, Entry]
    opener: Entry
    text: tuple[list[Any], list[Any]]
    latent: Entry
    sampler: Entry
    shift: Entry | None = None
    guidance: Entry | None = None
    negative: bool = False
    whole: bool = False


def conditioning(graph: Graph, text: Any = POSITIVE) -> dict[str, Entry]:
    """The prompt nodes; the sampler takes "guidance", if there is one, or "positive", and "negative"."""
    made = {"positive": node("CLIPTextEncode", clip=graph.text[0], text=text)}
    if graph.guidance:
        made["guidance"] = linked(graph.guidance, conditioning=["positive", 0])
    if graph.negative:
        made["negative"] = node("CLIPTextEncode", clip=graph.text[0], text=NEGATIVE)
    else:
        made["negative"] = node("ConditioningZeroOut", conditioning=["positive", 0])
    return made


def drawing(graph: Graph, model: list[Any], seed: Any = 1, tag: str = "") -> dict[str, Entry]:
    """The nodes from MODEL to picture, under keys that begin with `tag`; the picture comes from "<tag>decode"."""
    made = {}
    if graph.shift:
        made[f"{tag}shift"] = linked(graph.shift, model=model)
        model = [f"{tag}shift", 0]
    positive = ["guidance", 0] if graph.guidance else ["positive", 0]
    links = {"model": model, "positive": positive, "negative": ["negative", 0], "latent_image": ["latent", 0]}
    made[f"{tag}sampler"] = node("KSampler", **links, seed=seed, denoise=1.0, **graph.sampler)
    made[f"{tag}decode"] = node("VAEDecode", samples=[f"{tag}sampler", 0], vae=graph.text[1])
    return made


def linked(entry: Entry, **inputs: Any) -> Entry:
    """A copy with more inputs."""
    return {**entry, "inputs": {**inputs, **entry["inputs"]}}


def _converted(file: str, calls: int) -> str:
    """The name that HSWQ Converter gives the file after one Run of "calibrate and convert"."""
    return f"{file.removesuffix('.safetensors')}_hswq_r{calls}_3pct_comfy.safetensors"


def _checkpoint(title: str, file: str, size: int) -> Graph:
    return Graph(
        title=title,
        loaders={"model": node("CheckpointLoaderSimple", ckpt_name=file)},
        opener=node("HSWQLoader", ckpt_name=_converted(file, 20)),
        text=(["model", 1], ["model", 2]),
        latent=node("EmptyLatentImage", width=size, height=size, batch_size=1),
        sampler={"steps": 20, "cfg": 7.0, "sampler_name": "euler", "scheduler": "normal"},
        negative=True,
        whole=True,
    )


def _transformer(title: str, file: str, clip: Entry, steps: int, sampler_name: str, **rest: Any) -> Graph:
    return Graph(
        title=title,
        loaders={
            "model": node("UNETLoader", unet_name=file, weight_dtype="default"),
            "clip": clip,
            "vae": node("VAELoader", vae_name="ae.safetensors"),
        },
        opener=node("HSWQDiffusionModelLoader", model_name=_converted(file, steps)),
        text=(["clip", 0], ["vae", 0]),
        latent=node("EmptySD3LatentImage", width=1024, height=1024, batch_size=1),
        sampler={"steps": steps, "cfg": 1.0, "sampler_name": sampler_name, "scheduler": "simple"},
        **rest,
    )


GRAPHS = {
    "sdxl": _checkpoint("SDXL", "sd_xl_base_1.0.safetensors", 1024),
    "sd15": _checkpoint("SD 1.5", "v1-5-pruned-emaonly-fp16.safetensors", 512),
    "flux": _transformer(
        "Flux",
        "flux1-dev.safetensors",
        node("DualCLIPLoader", clip_name1="clip_l.safetensors", clip_name2="t5xxl_fp16.safetensors", type="flux"),
        20,
        "euler",
        guidance=node("FluxGuidance", guidance=3.5),
    ),
    "zimage": _transformer(
        "Z-Image",
        "z_image_turbo_bf16.safetensors",
        node("CLIPLoader", clip_name="qwen_3_4b.safetensors", type="lumina2"),
        8,
        "res_multistep",
        shift=node("ModelSamplingAuraFlow", shift=3.0),
    ),
}
