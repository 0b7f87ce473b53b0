"""Jobs to do with a family's graph, one row each, and the list of all templates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rig.prompts import node

from make.templates import notes
from make.templates.families import GRAPHS, Entry, Graph, conditioning, drawing

MODEL = ["model", 0]


@dataclass(frozen=True)
class Template:
    """One file of `workflows/`.

    name      file name without suffix
    title     two lines, shown on its picture
    prompt    the graph in API format, nodes by key
    note      Markdown
    columns   keys of the nodes, left to right, each column from top to bottom; absent nodes leave no gap
    focus     keys of the nodes that its picture shows
    bypassed  keys of the nodes that are bypassed
    """

    name: str
    title: tuple[str, str]
    prompt: dict[str, Entry]
    note: str
    columns: tuple[tuple[str, ...], ...]
    focus: tuple[str, ...]
    bypassed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Job:
    """One row: what a template takes from its job, and how its graph is made from a family's name and row."""

    name: str
    title: str
    build: Callable[[str, Graph], dict[str, Entry]]
    note: str
    columns: tuple[tuple[str, ...], ...]
    focus: tuple[str, ...]
    bypassed: tuple[str, ...] = ()

    def template(self, family: str, name: str = "") -> Template:
        """The job's template for one family."""
        graph = GRAPHS[family]
        folder = "output/checkpoints/" if graph.whole else "output/diffusion_models/"
        note = self.note.replace("{folder}", folder).replace("{session}", _session(family))
        title = (graph.title, self.title)
        prompt = self.build(family, graph)
        return Template(name or f"{family}_{self.name}", title, prompt, note, self.columns, self.focus, self.bypassed)


def _calibrate(family: str, graph: Graph) -> dict[str, Entry]:
    prompt = graph.loaders | {"calibration": _calibration(family)} | conditioning(graph) | {"latent": graph.latent}
    prompt |= drawing(graph, ["calibration", 0]) | {"save": _save(family)}
    return prompt | {"convert": _conversion(family, graph, after=["decode", 0])}


def _over_prompts(family: str, graph: Graph) -> dict[str, Entry]:
    prompts = node("HSWQCalibrationPrompts", index=0, prompts="")
    prompt = graph.loaders | {"prompts": prompts, "calibration": _calibration(family)}
    prompt |= conditioning(graph, ["prompts", 0]) | {"latent": graph.latent}
    prompt |= drawing(graph, ["calibration", 0], seed=["prompts", 1]) | {"save": _save(family)}
    return prompt | {"convert": _conversion(family, graph)}


def _load(family: str, graph: Graph) -> dict[str, Entry]:
    prompt = graph.loaders | {"model": graph.opener} | conditioning(graph) | {"latent": graph.latent}
    return prompt | drawing(graph, MODEL) | {"save": _save(family)}


def _compare(_: str, graph: Graph) -> dict[str, Entry]:
    prompt = graph.loaders | {"fp8": graph.opener} | conditioning(graph)
    prompt |= {"latent": graph.latent, "seed": node("PrimitiveInt", value=1)}
    prompt |= drawing(graph, MODEL, seed=["seed", 0]) | drawing(graph, ["fp8", 0], seed=["seed", 0], tag="fp8_")
    compared = node("HSWQCompare", reference=["decode", 0], candidate=["fp8_decode", 0])
    flicker = node("PreviewImage", images=["compare", 1])
    return prompt | {"compare": compared, "flicker": flicker, "report": node("PreviewAny", source=["compare", 2])}


def _calibration(family: str) -> Entry:
    return node("HSWQCalibration", model=MODEL, session=_session(family), save_every=50, states=-1, measure_every=4)


def _conversion(family: str, graph: Graph, **links: Any) -> Entry:
    """The conversion of the same MODEL that was calibrated."""
    if graph.whole:
        links |= {"clip": ["model", 1], "vae": ["model", 2]}
    settings = {"session": _session(family), "format": "comfy", "method": "model_aware"}
    settings |= {"extra_percent": 3.0, "keep_ratio": 0.25, "filename_prefix": ""}
    return node("HSWQConverter", model=["calibration", 0], **settings, **links)


def _save(family: str) -> Entry:
    return node("SaveImage", images=["decode", 0], filename_prefix=f"hswq/{family}")


def _session(family: str) -> str:
    return f"{family}_01"


LOADERS = ("model", "clip", "vae")
TEXTS = ("positive", "guidance", "negative", "latent")
SAMPLING = ("shift", "sampler", "decode")
CALIBRATE = Job(
    "calibrate_and_convert",
    "calibrate and convert",
    _calibrate,
    notes.CALIBRATE,
    (LOADERS, ("calibration", "convert"), TEXTS, SAMPLING, ("save",)),
    ("model", "calibration", "convert"),
)
LOAD = Job(
    "load",
    "load",
    _load,
    notes.LOAD,
    (LOADERS, TEXTS, SAMPLING, ("save",)),
    ("model",),
)
COMPARE = Job(
    "compare",
    "FP16 and FP8 side by side",
    _compare,
    notes.COMPARE,
    (
        ("model", "fp8", "clip", "vae"),
        (*TEXTS, "seed"),
        ("shift", "sampler", "fp8_shift", "fp8_sampler"),
        ("decode", "fp8_decode", "compare"),
        ("report", "flicker"),
    ),
    ("model", "fp8"),
)
OVER_PROMPTS = Job(
    "over_prompts",
    "calibrate over 32 prompts",
    _over_prompts,
    notes.OVER_PROMPTS,
    (("model", "prompts"), ("calibration", "convert"), TEXTS, SAMPLING, ("save",)),
    ("model", "prompts", "calibration", "convert"),
    bypassed=("convert",),
)
TEXT_ENCODER = Template(
    "text_encoder_convert",
    ("T5-XXL", "convert a text encoder"),
    {
        "convert": node(
            "HSWQFileConverter",
            file="text_encoders/t5xxl_fp16.safetensors",
            format="comfy",
            method="nearest",
            preset="encoder_only",
        ),
        "report": node("PreviewAny", source=["convert", 1]),
    },
    notes.TEXT_ENCODER,
    (("convert",), ("report",)),
    ("convert",),
)
TEMPLATES = [
    *(job.template(family) for family in GRAPHS for job in (CALIBRATE, LOAD, COMPARE)),
    OVER_PROMPTS.template("sdxl", "calibrate_over_prompts"),
    TEXT_ENCODER,
]
