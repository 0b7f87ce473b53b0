"""Calibration in a real ComfyUI: the picture is unchanged, statistics add up, hooks are removed."""

from __future__ import annotations

import re

import pytest
import safetensors.torch
import torch
from hswq.hswq_core.calibration.session import load_session
from hswq.hswq_core.calibration.states_file import count_states, states_path
from rig import flow, prompts, tiny
from rig.client import Prompt
from rig.server import ComfyServer
from rig.wait import until

pytestmark = pytest.mark.comfy

STEPS = 2


def calibrated(models, session: str, settings: dict[str, int] | None = None, **sampler) -> Prompt:
    plain = prompts.flux(models.flux(), models.taef(), **sampler)
    settings = {"save_every": 50, **(settings or {})}
    calibration = prompts.node("HSWQCalibration", model=["model", 0], session=session, **settings)
    return prompts.insert(plain, "calibration", calibration)


def troubled(models, session: str, mode: str, at: int, **sampler) -> Prompt:
    trouble = prompts.node("RigTrouble", model=["model", 0], mode=mode, at=at, seconds=0.5)
    return prompts.insert(calibrated(models, session, **sampler), "trouble", trouble)


def calls(server: ComfyServer, session: str) -> int:
    return load_session(server.output / "hswq_stats" / f"{session}.pt").calls


def hooks(server: ComfyServer) -> str:
    return server.client.run({"1": prompts.node("RigHooks")}).check().text()[-1]


def latent(server: ComfyServer, prompt: Prompt) -> torch.Tensor:
    """The sampled latent, saved instead of drawn."""
    kept = {key: entry for key, entry in prompt.items() if key not in ("vae", "decode", "save")}
    kept["save"] = prompts.node("SaveLatent", samples=["sampler", 0], filename_prefix="latents/flux")
    (file,) = server.client.run(kept).check().outputs["save"]["latents"]
    return safetensors.torch.load_file(server.output / file["subfolder"] / file["filename"])["latent_tensor"]


@pytest.mark.compat
def test_the_latent_is_bit_identical_with_and_without_calibration(server, models):
    plain = latent(server, prompts.flux(models.flux(), models.taef(), seed=4, steps=4))
    observed = latent(server, calibrated(models, "identical", seed=4, steps=4))
    assert calls(server, "identical") == 4
    assert plain.std() > 0
    assert torch.equal(plain, observed)


@pytest.mark.parametrize(
    ("settings", "measured"),
    [
        ({"measure_every": 1}, (8, 16)),
        # Calls 0, 2, 5, 7, then 10, 13 and 15.
        ({"measure_every": 3}, (4, 7)),
        # Calls 0, 2 and 5, then 10 and 13.
        pytest.param({}, (3, 5), marks=pytest.mark.compat),
        ({"measure_every": 100}, (1, 1)),
    ],
    ids=["every call", "one in three", "default", "one in a hundred"],
)
def test_one_call_in_so_many_is_measured_and_all_are_counted_and_offered(server, models, settings, measured):
    name = f"measures_{settings.get('measure_every', 'default')}"
    plain = latent(server, prompts.flux(models.flux(), models.taef(), seed=1, steps=8))
    for run, expected in enumerate(measured, 1):
        prompt = calibrated(models, name, settings, seed=run, steps=8)
        assert torch.equal(latent(server, prompt), plain) == (run == 1)
        server.client.free()  # the second run has a new node, which continues the session
        session = load_session(server.output / "hswq_stats" / f"{name}.pt")
        assert (session.calls, session.images) == (8 * run, run)
        assert {(s.in_calls, s.out_calls) for s in session.layers.values()} == {(expected, expected)}
        assert count_states(states_path(server.output / "hswq_stats" / f"{name}.pt")) == 8 * run


@pytest.mark.compat
def test_sessions_add_up_over_queue_items_a_dropped_cache_and_a_restart(server, models):
    server.client.run(calibrated(models, "adds", seed=1)).check()
    assert calls(server, "adds") == STEPS
    server.client.run(calibrated(models, "adds", seed=2)).check()  # the node itself is cached
    assert calls(server, "adds") == 2 * STEPS
    server.client.free()
    server.client.run(calibrated(models, "adds", seed=3)).check()
    assert calls(server, "adds") == 3 * STEPS
    server.restart()
    server.client.run(calibrated(models, "adds", seed=4)).check()
    session = load_session(server.output / "hswq_stats" / "adds.pt")
    assert (session.calls, session.images, session.steps) == (4 * STEPS, 4, {STEPS: 4})


@pytest.mark.compat
def test_an_identical_prompt_is_cached_and_recorded_once(server, models):
    prompt = calibrated(models, "cached", seed=5)
    server.client.run(prompt).check()
    server.client.run(prompt).check()
    assert calls(server, "cached") == STEPS


@pytest.mark.compat
def test_hooks_are_gone_after_success(server, models):
    server.client.run(calibrated(models, "hooks_ok", seed=6)).check()
    assert hooks(server) == "0"


@pytest.mark.compat
def test_hooks_are_gone_after_an_error_and_what_was_seen_is_saved(server, models):
    result = server.client.run(troubled(models, "hooks_error", "raise", at=3, seed=7, steps=5))
    assert result.status == "error"
    assert hooks(server) == "0"
    assert calls(server, "hooks_error") == 2


@pytest.mark.compat
def test_hooks_are_gone_after_cancel_and_what_was_seen_is_saved(server, models):
    with server.client.listen() as heard:
        queued = server.client.submit(troubled(models, "hooks_cancel", "slow", at=1, seed=8, steps=20))
        until(lambda: heard.of("progress"))
        server.client.interrupt()
        result = server.client.wait(queued)
    assert result.status == "interrupted"
    assert hooks(server) == "0"
    assert 1 <= calls(server, "hooks_cancel") < 20


@pytest.mark.compat
def test_only_the_calibrated_branch_is_recorded(server, models):
    """Both branches sample the same model object."""
    both = calibrated(models, "branch", seed=9)
    both["plain"] = prompts.sampler(seed=10, cfg=1.0, scheduler="simple", positive=["guidance", 0])
    both["plain_decode"] = prompts.node("VAEDecode", samples=["plain", 0], vae=["vae", 0])
    both["plain_save"] = prompts.node("SaveImage", images=["plain_decode", 0], filename_prefix="plain")
    server.client.run(both).check()
    assert calls(server, "branch") == STEPS


@pytest.mark.compat
def test_two_sessions_in_series_record_the_same(server, models):
    second = prompts.node("HSWQCalibration", model=["calibration", 0], session="series_b", save_every=50)
    prompt = prompts.insert(calibrated(models, "series_a", seed=11), "second", second, after="calibration")
    server.client.run(prompt).check()
    a, b = (load_session(server.output / "hswq_stats" / f"series_{x}.pt") for x in "ab")
    assert a.calls == b.calls == STEPS
    assert all(torch.equal(a.layers[name].abs_sum, b.layers[name].abs_sum) for name in a.layers)


def test_saves_within_a_run(server, models):
    prompt = troubled(models, "often", "slow", at=4, seed=12, steps=8)
    prompt["calibration"]["inputs"]["save_every"] = 1
    queued = server.client.submit(prompt)
    path = server.output / "hswq_stats" / "often.pt"
    until(path.exists)
    assert 1 <= load_session(path).calls < 8
    server.client.wait(queued).check()
    assert calls(server, "often") == 8


@pytest.mark.compat
def test_the_node_says_what_it_records(server, models):
    """At the start of a run, during it, and at each save; in a second run the node is cached and the line goes on."""
    prompt = troubled(models, "says", "slow", at=1, seed=13, steps=5)
    with server.client.listen() as heard:
        server.client.run(prompt).check()
        until(
            lambda: any(re.fullmatch(r"Flux · 26 layers · 5 calls · saved \d\d:\d\d", s) for s in heard.progress_text())
        )
        said = [text for text in heard.progress_text() if text.startswith("Flux · ")]
    assert said[0] == "Flux · 26 layers · 0 calls · unsaved"
    assert any(re.fullmatch("Flux · 26 layers · [1-4] calls · unsaved", text) for text in said)
    assert len(said) < 5  # 2.5 s: not one per call
    prompt["sampler"]["inputs"]["seed"] += 1
    with server.client.listen() as heard:
        server.client.run(prompt).check()
        until(lambda: any(" · 10 calls · saved " in text for text in heard.progress_text()))
        said = [text for text in heard.progress_text() if text.startswith("Flux · ")]
    assert re.fullmatch(r"Flux · 26 layers · 5 calls · saved \d\d:\d\d", said[0])


def test_the_node_says_when_saving_fails(comfy, tmp_path, caplog):
    """A folder replaces the session's file while the model draws: the calls stay in memory until the next save."""
    from hswq.loader.calibration.model import calibrated as watched

    lines: list[str] = []
    model = watched(comfy.load_model(tiny.make("flux-tiny")), tmp_path / "fails.pt", 50, lines.append)
    (tmp_path / "fails.pt").mkdir()
    comfy.sample(model, steps=2, cfg=1.0)
    assert lines[-1] == "Flux · 26 layers · 2 calls · saving failed, see the log"
    assert "kept in memory until the next save" in caplog.text
    (tmp_path / "fails.pt").rmdir()
    comfy.sample(model, steps=2, cfg=1.0)
    assert re.fullmatch(r"Flux · 26 layers · 4 calls · saved \d\d:\d\d", lines[-1])
    assert load_session(tmp_path / "fails.pt").calls == 4


@pytest.mark.compat
def test_the_shipped_workflow_calibrates_with_its_converter_bypassed(server):
    prompt = flow.calibration(flow.prepare(server, "flux", flow.CALIBRATE, seed=14, session="bypassed"))
    server.client.run(prompt).check()
    assert calls(server, "bypassed") == STEPS
