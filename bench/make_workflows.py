"""Make workflows/*.json anew: the graphs below, laid out and saved by the real ComfyUI page.

    nox -s bench -- make_workflows.py

Two for each family: "calibrate and convert" and "load". Needs Chromium.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rig.pack import ROOT
from rig.page import Page
from rig.prompts import node
from rig.server import ComfyServer

WORKFLOWS = ROOT / "workflows"
CALIBRATE, LOAD = "calibrate_and_convert", "load"
POSITIVE = "a lighthouse on a rocky coast at dusk, warm light in the windows, waves below, detailed oil painting"
NEGATIVE = "blurry, low quality"

NOTES = {
    CALIBRATE: """## Calibrate and convert

1. Choose your FP16/BF16 model. Press **Run**: the picture is drawn as always, *HSWQ Calibration* records what
   every layer sees, and *HSWQ Converter* then writes the FP8 file.
2. Better statistics: bypass the converter (select it, Ctrl+B), run a few different prompts, then switch it on
   again. Runs of the same session name add up, also after a restart.
3. Press **R** to make the loaders list the new file, then open it: **comfy** in the stock loader,
   **v2** and **v1** in *HSWQ Loader*.

Statistics: `output/hswq_stats/`. File: `{folder}`.""",
    LOAD: """## Load

The FP8 weights stay FP8 in memory, convolutions too; the layers that were kept stay FP16.
LoRAs go behind the loader as usual. Files of the **comfy** format also open in ComfyUI's own loader.""",
}


@dataclass(frozen=True)
class Graph:
    """One family's graph.

    loaders    the stock loader nodes by key; the MODEL comes from "model"
    opener     the HSWQ loader that takes the place of "model" in the load workflow
    text       (CLIP source, VAE source) as links
    latent     the empty latent node
    shift      a node between MODEL and sampler, or None
    guidance   a node between prompt and sampler, or None
    negative   a second prompt (True), or the first one zeroed out
    sampler    what differs from KSampler's defaults
    """

    loaders: dict[str, dict[str, Any]]
    opener: dict[str, Any]
    text: tuple[list[Any], list[Any]]
    latent: dict[str, Any]
    sampler: dict[str, Any]
    shift: dict[str, Any] | None = None
    guidance: dict[str, Any] | None = None
    negative: bool = False
    whole: bool = False


def _checkpoint(file: str, converted: str, size: int) -> Graph:
    return Graph(
        loaders={"model": node("CheckpointLoaderSimple", ckpt_name=file)},
        opener=node("HSWQLoader", ckpt_name=converted),
        text=(["model", 1], ["model", 2]),
        latent=node("EmptyLatentImage", width=size, height=size, batch_size=1),
        sampler={"steps": 20, "cfg": 7.0, "sampler_name": "euler", "scheduler": "normal"},
        negative=True,
        whole=True,
    )


def _transformer(file: str, converted: str, clip: dict[str, Any], **rest: Any) -> Graph:
    return Graph(
        loaders={
            "model": node("UNETLoader", unet_name=file, weight_dtype="default"),
            "clip": clip,
            "vae": node("VAELoader", vae_name="ae.safetensors"),
        },
        opener=node("HSWQDiffusionModelLoader", model_name=converted),
        text=(["clip", 0], ["vae", 0]),
        latent=node("EmptySD3LatentImage", width=1024, height=1024, batch_size=1),
        **rest,
    )


GRAPHS = {
    "sdxl": _checkpoint("sd_xl_base_1.0.safetensors", "sd_xl_base_1.0_hswq_r40_0.25_v2.safetensors", 1024),
    "sd15": _checkpoint("v1-5-pruned-emaonly-fp16.safetensors", "v1-5_hswq_r40_0.25_v2.safetensors", 512),
    "flux": _transformer(
        "flux1-dev.safetensors",
        "flux1-dev_hswq_r20_0.25_v2.safetensors",
        node("DualCLIPLoader", clip_name1="clip_l.safetensors", clip_name2="t5xxl_fp16.safetensors", type="flux"),
        sampler={"steps": 20, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple"},
        guidance=node("FluxGuidance", guidance=3.5),
    ),
    "zimage": _transformer(
        "z_image_turbo_bf16.safetensors",
        "z_image_turbo_bf16_hswq_r8_0.25_v2.safetensors",
        node("CLIPLoader", clip_name="qwen_3_4b.safetensors", type="lumina2"),
        sampler={"steps": 8, "cfg": 1.0, "sampler_name": "res_multistep", "scheduler": "simple"},
        shift=node("ModelSamplingAuraFlow", shift=3.0),
    ),
}

# Where a node stands: column and row position in pixels, by key.
PLACES = {
    "model": (0, 0),
    "clip": (0, 180),
    "vae": (0, 380),
    "calibration": (360, 0),
    "shift": (360, 190),
    "positive": (720, 0),
    "guidance": (720, 230),
    "negative": (720, 350),
    "latent": (720, 580),
    "sampler": (1150, 0),
    "decode": (1150, 340),
    "save": (1500, 0),
    "convert": (360, 760),
    "report": (820, 760),
}
SIZES = {
    "CLIPTextEncode": (390, 180),
    "SaveImage": (420, 480),
    "HSWQConverter": (420, 330),
    "PreviewAny": (560, 300),
}
NOTE_PLACE, NOTE_SIZE = (-520, 0), (480, 420)


def prompt_of(family: str, job: str) -> dict[str, dict[str, Any]]:
    """The graph of a family and job in API format, nodes by key."""
    graph, model = GRAPHS[family], ["model", 0]
    prompt = dict(graph.loaders)
    if job == LOAD:
        prompt["model"] = graph.opener
    else:
        prompt["calibration"] = node("HSWQCalibration", model=model, session=f"{family}_01", save_every=50, states=128)
        model = ["calibration", 0]
    sampled = model
    if graph.shift is not None:
        prompt["shift"] = _with(graph.shift, model=model)
        sampled = ["shift", 0]
    prompt |= _conditioning(graph)
    positive = ["guidance", 0] if graph.guidance else ["positive", 0]
    links = {"model": sampled, "positive": positive, "negative": ["negative", 0], "latent_image": ["latent", 0]}
    prompt["latent"] = graph.latent
    prompt["sampler"] = node("KSampler", **links, seed=1, denoise=1.0, **graph.sampler)
    prompt["decode"] = node("VAEDecode", samples=["sampler", 0], vae=graph.text[1])
    prompt["save"] = node("SaveImage", images=["decode", 0], filename_prefix=f"hswq/{family}")
    return prompt | (_conversion(graph, family, model) if job == CALIBRATE else {})


def _conditioning(graph: Graph) -> dict[str, dict[str, Any]]:
    prompt = {"positive": node("CLIPTextEncode", clip=graph.text[0], text=POSITIVE)}
    if graph.guidance:
        prompt["guidance"] = _with(graph.guidance, conditioning=["positive", 0])
    if graph.negative:
        prompt["negative"] = node("CLIPTextEncode", clip=graph.text[0], text=NEGATIVE)
    else:
        prompt["negative"] = node("ConditioningZeroOut", conditioning=["positive", 0])
    return prompt


def _conversion(graph: Graph, family: str, model: list[Any]) -> dict[str, dict[str, Any]]:
    whole = {"clip": ["model", 1], "vae": ["model", 2]} if graph.whole else {}
    settings = {"session": f"{family}_01", "format": "comfy", "method": "model_aware"}
    settings |= {"extra_percent": 3.0, "keep_ratio": 0.25}
    convert = node("HSWQConverter", model=model, filename_prefix="", after=["decode", 0], **settings, **whole)
    return {"convert": convert, "report": node("PreviewAny", source=["convert", 1])}


def _with(entry: dict[str, Any], **inputs: Any) -> dict[str, Any]:
    return {**entry, "inputs": {**inputs, **entry["inputs"]}}


def numbered(prompt: dict[str, dict[str, Any]]) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """The prompt with node ids 1, 2, 3... as the page wants them, and {key: id}."""
    ids = {key: str(i) for i, key in enumerate(prompt, 1)}

    def link(value: Any) -> Any:
        return [ids[value[0]], value[1]] if isinstance(value, list) else value

    entries = {
        ids[key]: {**entry, "inputs": {name: link(value) for name, value in entry["inputs"].items()}}
        for key, entry in prompt.items()
    }
    return entries, ids


def make(page: Page, family: str, job: str) -> dict[str, Any]:
    """The UI-format workflow."""
    prompt, ids = numbered(prompt_of(family, job))
    workflow = page.from_api(prompt, arrange=False)
    place = {int(ids[key]): key for key in ids}
    for entry in workflow["nodes"]:
        key = place[entry["id"]]
        entry["pos"] = list(PLACES[key])
        entry["size"] = list(SIZES.get(entry["type"], entry["size"]))
    folder = "output/checkpoints/" if GRAPHS[family].whole else "output/diffusion_models/"
    number = max(place) + 1
    workflow["nodes"].append(_note(number, NOTES[job].replace("{folder}", folder)))
    workflow["last_node_id"] = number
    return workflow


def _note(number: int, text: str) -> dict[str, Any]:
    return {
        "id": number,
        "type": "MarkdownNote",
        "pos": list(NOTE_PLACE),
        "size": list(NOTE_SIZE),
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": [],
        "outputs": [],
        "properties": {},
        "widgets_values": [text],
    }


def main() -> None:
    """Write all files; with --screenshots also a picture of each as the page shows it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--screenshots", type=Path, help="folder for a picture of each workflow")
    options = parser.parse_args()
    WORKFLOWS.mkdir(exist_ok=True)
    with ComfyServer() as server, Page(server.url, size=(2400, 1350)) as page:
        for family in GRAPHS:
            for job in (CALIBRATE, LOAD):
                workflow = make(page, family, job)
                path = WORKFLOWS / f"{family}_{job}.json"
                path.write_text(json.dumps(workflow, indent=2) + "\n", encoding="utf-8")
                print(path.relative_to(ROOT))
                if options.screenshots:
                    options.screenshots.mkdir(parents=True, exist_ok=True)
                    page.load(workflow)
                    page.fit()
                    page.screenshot(options.screenshots / f"{path.stem}.png")


if __name__ == "__main__":
    main()
