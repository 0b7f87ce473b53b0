"""The shipped workflows in a real ComfyUI: calibrate, convert to every format, open, draw."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
import torch
from hswq.hswq_core.calibration.observer import is_measured
from hswq.hswq_core.calibration.session import Session, load_session
from hswq.hswq_core.files.checkpoint import FileSource
from hswq.hswq_core.quant.grid import FLOAT8_E4M3FN
from PIL import Image
from rig import flow, graph, tiny
from rig.client import Prompt
from rig.server import ComfyServer
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.comfy

FORMATS = ("v1", "v2", "comfy")
FAMILIES = ["flux", "sd15", "sdxl", pytest.param("zimage", marks=pytest.mark.slow)]
NAMES = {"flux": "Flux", "sd15": "SD1.5", "sdxl": "SDXL", "zimage": "Z-Image"}
STEPS = 2
# The default where it takes seconds; convolutions of 5760 columns take longer than they are worth here.
METHODS = {"flux": ("model_aware", "3pct")}
HSWQ = ("hswq", "0.25")


@dataclass
class Run:
    """One family, calibrated over two queue items and converted on first use.

    Attributes:
        pictures: drawn by the file of a format, by the stock loader or not.
        effects: of a LoRA on the original's picture.
    """

    server: ComfyServer
    family: str
    files: dict[str, Path] = field(default_factory=dict)
    pictures: dict[tuple[str, bool], np.ndarray] = field(default_factory=dict)
    effects: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.session_name = f"main_{self.family}"
        for seed in (1, 2):
            self.server.client.run(flow.calibration(self.workflow(seed))).check()

    def workflow(self, seed: int = 0) -> Prompt:
        settings = {"steps": STEPS, "seed": seed, "session": self.session_name}
        return flow.prepare(self.server, self.family, flow.CALIBRATE, **settings)

    @cached_property
    def session(self) -> Session:
        return load_session(self.server.output / "hswq_stats" / f"{self.session_name}.pt")

    def file(self, name: str) -> Path:
        if name not in self.files:
            before = set(self.server.output.rglob("*.safetensors"))
            settings = {"format": name, "method": METHODS.get(self.family, HSWQ)[0]}
            self.server.client.run(flow.conversion(self.server, self.workflow(), **settings)).check()
            (self.files[name],) = set(self.server.output.rglob("*.safetensors")) - before
        return self.files[name]

    def load(self, name: str, *, stock: bool) -> Prompt:
        load = flow.prepare(self.server, self.family, flow.LOAD, steps=STEPS, seed=7)
        return flow.opening(load, self.file(name).name, self.file(name).parent.name, stock=stock)

    def original(self) -> Prompt:
        load = flow.prepare(self.server, self.family, flow.LOAD, steps=STEPS, seed=7)
        family = flow.FAMILIES[self.family]
        return flow.opening(load, f"{family.kind}.safetensors", family.folder, stock=True)

    @cached_property
    def reference(self) -> np.ndarray:
        """The original's picture."""
        return self.draw(self.original())

    def picture(self, name: str, *, stock: bool) -> np.ndarray:
        if (name, stock) not in self.pictures:
            self.pictures[name, stock] = self.draw(self.load(name, stock=stock))
        return self.pictures[name, stock]

    def effect(self, lora: str) -> np.ndarray:
        if lora not in self.effects:
            self.effects[lora] = self.draw(_lora(self.original(), lora)) - self.reference
        return self.effects[lora]

    def draw(self, prompt: Prompt) -> np.ndarray:
        (image,) = self.server.client.run(prompt).check().images()
        pixels = Image.open(io.BytesIO(self.server.client.view(image))).convert("RGB")
        return np.asarray(pixels).astype(float)


@pytest.fixture(scope="module")
def runs(server):
    made: dict[str, Run] = {}

    def get(family: str) -> Run:
        if family not in made:
            made[family] = Run(server, family)
        return made[family]

    return get


@pytest.mark.compat
@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_is_seen_in_every_call_that_is_measured(runs, family):
    run = runs(family)
    source = tiny.layer_shapes(tiny.make(flow.FAMILIES[family].kind))
    session = run.session
    assert session.family == NAMES[family]
    # the UNets' cfg 7 needs two predictions per step, in one call when the prompts have the same length
    assert session.calls >= 2 * STEPS
    assert {name for name, stats in session.layers.items()} <= set(source)
    # matrices in these files that are not layers: none
    assert set(source) - set(session.layers) == set()
    measured = sum(is_measured(call, 4) for call in range(session.calls))  # over two runs
    assert {(s.in_calls, s.out_calls) for s in session.layers.values()} == {(measured, measured)}
    assert session.images == 2
    assert session.steps == {STEPS: 2}
    assert all(float(s.importance.sum()) > 0 and s.input_amax > 0 for s in session.layers.values())


@pytest.mark.parametrize(
    ("family", "name"),
    [
        *(pytest.param(family, name, marks=pytest.mark.compat) for family in ("flux", "sd15") for name in FORMATS),
        pytest.param("sdxl", "v2", marks=pytest.mark.compat),
        ("sdxl", "v1"),
        ("sdxl", "comfy"),
        *(pytest.param("zimage", name, marks=pytest.mark.slow) for name in FORMATS),
    ],
)
def test_a_file_draws_almost_the_same_picture(runs, family, name):
    run = runs(family)
    reference = run.reference
    openers = {"v1": (True, False), "v2": (False,), "comfy": (True, False)}[name]
    before = len(run.server.log())
    for stock in openers:
        drawn = run.pictures[name, stock] = run.draw(run.load(name, stock=stock))
        assert drawn.std() > 5, "a NaN picture comes out black"
        error = np.sqrt(np.square(drawn - reference).mean())
        # A random model's FP8 weights shift pixels by a few levels; a lost scale gives noise (over 40).
        assert error < 16
    log = run.server.log()[before:]
    assert "unet missing" not in log
    assert "unet unexpected" not in log
    assert "left over keys" not in log


@pytest.mark.parametrize("family", FAMILIES)
def test_header_and_accounting(runs, family):
    run = runs(family)
    layers = len(run.session.layers)
    for name in FORMATS:
        file = FileSource(run.file(name))
        header = json.loads(file.metadata["hswq"])
        assert sum(header["counts"].values()) == layers
        float8 = sum(info.dtype == FLOAT8_E4M3FN.dtype for info in file.entries.values())
        assert header["counts"]["quantize"] == float8
        assert header["format"] == name
        assert header["session"]["calls"] == run.session.calls
        budget = METHODS.get(family, HSWQ)[1]
        assert run.file(name).name.endswith(f"_hswq_r{run.session.calls}_{budget}_{name}.safetensors")


@pytest.mark.compat
def test_a_whole_checkpoint_keeps_text_encoder_and_vae_bit_by_bit(runs):
    run = runs("sd15")
    source = FileSource(tiny.make("sd15-small"))
    for name in FORMATS:
        file = FileSource(run.file(name))
        assert run.file(name).parent.name == "checkpoints"
        others = [key for key in source.entries if not key.startswith("model.diffusion_model.")]
        assert others
        assert [key for key in file.entries if key in others] == others
        assert all(torch.equal(file.read(key), source.read(key)) for key in others)


def test_sdxl_alone_goes_where_diffusion_models_are(runs):
    assert runs("sdxl").file("comfy").parent.name == "diffusion_models"


@pytest.mark.parametrize(
    ("family", "name", "stock"),
    [
        pytest.param("flux", "v1", True, marks=pytest.mark.compat),
        ("flux", "v1", False),
        pytest.param("flux", "v2", False, marks=pytest.mark.compat),
        pytest.param("flux", "comfy", True, marks=pytest.mark.compat),
        pytest.param("sd15", "v2", False, marks=pytest.mark.compat),
        ("sd15", "comfy", True),
        ("sdxl", "v1", False),
        pytest.param("sdxl", "v2", False, marks=pytest.mark.compat),
        ("sdxl", "comfy", True),
        pytest.param("zimage", "v1", True, marks=pytest.mark.slow),
        pytest.param("zimage", "v2", False, marks=pytest.mark.slow),
        pytest.param("zimage", "comfy", True, marks=pytest.mark.slow),
    ],
)
def test_a_lora_changes_the_picture_of_a_file_as_it_changes_the_original(runs, models, family, name, stock):
    run = runs(family)
    lora = models.lora(flow.FAMILIES[family].kind)
    effect = run.draw(_lora(run.load(name, stock=stock), lora)) - run.picture(name, stock=stock)
    wanted = run.effect(lora)
    assert np.abs(effect).mean() > 2
    # A lost LoRA has no effect, and a different LoRA's effect is orthogonal; what remains is only FP8 noise, which a
    # random model amplifies at cfg 7.
    cosine = (effect * wanted).sum() / np.sqrt(np.square(effect).sum() * np.square(wanted).sum())
    assert cosine > 0.5


def _lora(prompt: Prompt, name: str) -> Prompt:
    from rig import prompts

    loader = next(k for k, e in prompt.items() if e["class_type"] in flow.FILE_INPUT)
    entry = prompts.node("LoraLoaderModelOnly", model=[loader, 0], lora_name=name, strength_model=1.0)
    return prompts.insert(prompt, "lora", entry, after=loader)


@pytest.mark.compat
def test_a_file_converted_anew_under_its_name_is_opened_anew(runs):
    run = runs("flux")
    name = "anew.safetensors"
    file = run.file("v2").with_name(name)
    prompt = flow.opening(run.load("v2", stock=False), name, file.parent.name, stock=False)
    (loader,) = [key for key, entry in prompt.items() if entry["class_type"].startswith("HSWQ")]
    shutil.copy(run.file("v2"), file)
    try:
        assert loader not in run.server.client.run(prompt).check().cached
        assert loader in run.server.client.run(prompt).check().cached
        shutil.copy(run.file("v1"), file.with_suffix(".tmp"))
        file.with_suffix(".tmp").replace(file)
        assert loader not in run.server.client.run(prompt).check().cached
        assert loader in run.server.client.run(prompt).check().cached
    finally:
        file.unlink()


@pytest.mark.compat
def test_a_damaged_file_is_refused_by_name_and_the_next_prompt_runs(runs):
    run = runs("flux")
    file = run.file("v2").with_name("damaged.safetensors")
    state = load_file(run.file("v2"))
    key = next(key for key in state if key.endswith(".scale") and state[key].shape == (1,))
    save_file(state | {key: torch.tensor([float("nan")])}, file)
    load = run.load("v2", stock=False)
    try:
        result = run.server.client.run(flow.opening(load, file.name, file.parent.name, stock=False))
    finally:
        file.unlink()
    assert not result.ok
    for word in ("damaged.safetensors", key, "NaN", "convert or download it again"):
        assert word in result.errors[0]
    assert run.draw(load).std() > 5


@pytest.mark.compat
def test_the_loaders_options_arrive(runs, models):
    run = runs("flux")
    plain = run.load("v2", stock=False)
    (loader,) = [key for key, entry in plain.items() if entry["class_type"].startswith("HSWQ")]
    lora = _lora(plain, models.lora(flow.FAMILIES["flux"].kind))
    drawn = {}
    for mode in ("exact", "stock"):
        prompt = {key: {**entry, "inputs": dict(entry["inputs"])} for key, entry in lora.items()}
        prompt[loader]["inputs"] |= {"lora": mode, "dequantize_dtype": "float32", "fp8_matmul": False}
        drawn[mode] = run.draw(prompt)
    assert (drawn["exact"] == run.draw(lora)).all()  # the default
    assert (drawn["exact"] != drawn["stock"]).any()
    prompt[loader]["inputs"] |= {"lora": "sometimes"}
    assert not run.server.client.run(prompt).ok


@pytest.mark.compat
def test_one_run_of_the_shipped_workflow_calibrates_and_converts(server):
    prompt = flow.prepare(server, "flux", flow.CALIBRATE, session="one_run", seed=3, steps=4)
    result = server.client.run(prompt).check()
    report = result.text()[-1]
    session = load_session(server.output / "hswq_stats" / "one_run.pt")
    assert session.calls == 4
    assert f"session of {session.calls} calls" in report
    assert "method model_aware 3pct," in report
    assert "= 26 layers" in report


@pytest.mark.parametrize("name", ["v1", "v2", pytest.param("comfy", marks=pytest.mark.compat)])
def test_model_aware_runs_the_recorded_calls_and_writes_a_file_that_opens(server, name):
    settings = {"session": "aware_flow", "steps": 4}
    workflow = flow.prepare(server, "flux", flow.CALIBRATE, **settings)
    if not (server.output / "hswq_stats" / "aware_flow.pt").exists():
        for seed in (1, 2):
            server.client.run(flow.calibration(flow.prepare(server, "flux", flow.CALIBRATE, seed=seed, **settings)))
    before = set(server.output.rglob("*.safetensors"))
    convert = flow.conversion(server, workflow, format=name, method="model_aware", extra_percent=5.0)
    report = server.client.run(convert).check().text()[-1]
    assert "method model_aware 5pct," in report
    assert "model output on unseen calls" in report
    (file,) = set(server.output.rglob("*.safetensors")) - before
    assert file.name.endswith(f"_hswq_r8_5pct_{name}.safetensors")
    load = flow.prepare(server, "flux", flow.LOAD, steps=STEPS, seed=7)
    pictures = []
    for opened, stock in ((file.name, name == "comfy"), ("flux-tiny.safetensors", True)):
        (image,) = server.client.run(flow.opening(load, opened, file.parent.name, stock=stock)).check().images()
        pictures.append(np.asarray(Image.open(io.BytesIO(server.client.view(image))).convert("RGB")).astype(float))
    assert pictures[0].std() > 5
    assert np.sqrt(np.square(pictures[0] - pictures[1]).mean()) < 16


@pytest.mark.compat
def test_converting_again_follows_the_grown_session(server):
    settings = {"session": "grown", "steps": 4}
    workflow = flow.prepare(server, "flux", flow.CALIBRATE, **settings)
    converter = graph.find(workflow, "HSWQConverter")
    server.client.run(flow.calibration(workflow)).check()
    convert = flow.conversion(server, workflow)
    assert converter not in server.client.run(convert).check().cached
    assert converter in server.client.run(convert).check().cached
    server.client.run(flow.calibration(flow.prepare(server, "flux", flow.CALIBRATE, seed=9, **settings))).check()
    again = server.client.run(convert).check()
    assert converter not in again.cached
    assert "session of 8 calls" in again.text()[-1]
