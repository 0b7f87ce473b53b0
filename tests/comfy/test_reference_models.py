"""The trained reference models: real ComfyUI recognizes them, and they draw what their captions say."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from reference_models.architectures import FOLDER, REFERENCES, Reference, build, register
from reference_models.captions import random_scene
from reference_models.pictures import draw as drawing
from reference_models.prompts import evaluation_prompts
from reference_models.sampling import call_error, draw, record
from reference_models.start import start_as_identity
from reference_models.training import Settings, Trainer, TrainingLayers, _initialise, training_mode
from rig.inprocess import load_model
from safetensors import safe_open

pytestmark = pytest.mark.comfy

MOST_BYTES = 20_000_000
PICTURES = 8


@pytest.fixture(params=sorted(REFERENCES))
def reference(request, comfy) -> Reference:
    register()
    return REFERENCES[request.param]


def scenes(count: int) -> list:
    """The scenes behind the evaluation prompts."""
    rng = random.Random("evaluation")
    return [random_scene(rng) for _ in range(count)]


def test_comfyui_recognizes_the_file_as_it_was_built(reference, caplog):
    model = load_model(reference.file).model
    detected = model.model_config.unet_config
    assert {key: detected.get(key) for key in reference.config} == reference.config
    assert isinstance(model.model_config, reference.row().__mro__[1])  # ComfyUI's own row, or a subclass
    assert "missing" not in caplog.text
    assert "unexpected" not in caplog.text


def test_the_unet_starts_as_the_identity(comfy):
    """At the highest sigma its prediction is the noise it sees, mean and size included."""
    unet = build(REFERENCES["sdxl"], TrainingLayers, "cpu").diffusion_model
    _initialise(unet, REFERENCES["sdxl"].zeros)
    start_as_identity(unet)
    x = torch.randn(4, 16, 16, 16) * (1 + 0.05 * torch.randn(4, 16, 1, 1)) + 0.1 * torch.randn(4, 16, 1, 1)
    found = unet(x, torch.full((4,), 999.0), context=torch.zeros(4, 16, 128), y=torch.zeros(4, 1664))
    assert (found - x).square().mean() < 1e-3
    assert (found - x).mean((2, 3)).square().mean() < 1e-4


def test_registering_again_changes_nothing(comfy):
    import comfy.supported_models

    register()
    known = list(comfy.supported_models.models)
    register()
    assert comfy.supported_models.models == known


def test_files_are_small_and_fp16_and_say_how_they_were_made(reference):
    assert reference.file.stat().st_size <= MOST_BYTES
    with safe_open(reference.file, "pt") as file:
        metadata = file.metadata()
        dtypes = {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118 - not a mapping
    assert dtypes == {"F16"}
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    for said in (metadata["steps"], metadata["loss"], f"{reference.file.stat().st_size:,}"):
        assert said in card


def test_pictures_show_what_their_captions_say(reference):
    """Among the drawings of eight captions, each picture is nearest to that of its own caption."""
    pictures = draw(load_model(reference.file), reference, evaluation_prompts(PICTURES))
    ideal = drawing(scenes(PICTURES), pictures.shape[-1])
    distances = (pictures[:, None] - ideal[None]).square().mean((2, 3, 4))
    assert distances.argmin(1).tolist() == list(range(PICTURES))


def test_a_picture_depends_on_its_seed_and_not_on_its_batch(reference):
    model = load_model(reference.file)
    (first, second) = evaluation_prompts(2)
    together = draw(model, reference, [first, second])
    alone = draw(model, reference, [first])
    torch.testing.assert_close(together[:1], alone, atol=1e-3, rtol=0)
    assert not torch.allclose(draw(model, reference, [replace(first, seed=5)]), alone, atol=1e-2)


def test_recorded_calls_repeat_without_error(reference):
    model = load_model(reference.file)
    calls = record(model, reference, evaluation_prompts(2))
    assert len(calls) == reference.steps
    assert call_error(model, calls) < 1e-5


def test_a_resumed_training_run_ends_as_an_uninterrupted_one(reference, tmp_path):
    settings = Settings(steps=3, batch=2, latent_size=8, warmup=1)
    with torch.inference_mode(False):
        whole, first, second = (Trainer(reference, settings, torch.device("cpu")) for _ in range(3))
        whole.run(lambda *_: None, lambda: None, 10)
        with training_mode():
            first._step()
        torch.save(first.state(), tmp_path / "state.pt")
        second.resume(tmp_path / "state.pt")
        second.run(lambda *_: None, lambda: None, 10)
    assert whole.losses == second.losses
    assert len(set(whole.losses)) == 3
    assert all(torch.equal(a, b) for a, b in zip(whole.trained().values(), second.trained().values(), strict=True))
    with pytest.raises(ValueError, match="was trained with"):
        Trainer(reference, replace(settings, steps=4), torch.device("cpu")).resume(tmp_path / "state.pt")


def test_training_reaches_every_weight(reference):
    """Even weights behind a zero layer, after the first steps: no in-place addition cuts off their gradient."""
    settings = Settings(steps=5, batch=2, latent_size=8, warmup=0)
    with torch.inference_mode(False):
        trainer = Trainer(reference, settings, torch.device("cpu"))
        trainer.run(lambda *_: None, lambda: None, 10)
        dead = [name for name, p in trainer.weights.named_parameters() if p.grad is None or not p.grad.any()]
    assert dead == []


def test_the_names_of_the_file_are_those_the_model_loads(reference):
    built = build(reference, TrainingLayers, "meta").diffusion_model.state_dict()
    with safe_open(reference.file, "pt") as file:
        stored = set(file.keys())
    assert stored == {reference.on_disk(name) for name in built}
