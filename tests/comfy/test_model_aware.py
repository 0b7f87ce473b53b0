"""Method model_aware on the trained Flux-layout model: states, replay, rounding, choice, file."""

from __future__ import annotations

import logging

import pytest
import torch
from hswq.hswq_core import FLOAT8_E4M3FN, KEEP, QUANTIZE, SKIP, FileSource, SessionError, format_named
from hswq.hswq_core.states import load_states
from reference_models.architectures import REFERENCES
from reference_models.prompts import calibration_prompts
from reference_models.sampling import draw
from rig.inprocess import load_model

pytestmark = pytest.mark.comfy

REFERENCE = REFERENCES["flux"]
PICTURES, STATES = 6, 24


@pytest.fixture(scope="module")
def calibrated_model():
    """The model and the name of a session with states; everything in inference mode, as in the server."""
    from rig import inprocess

    inprocess.load_comfy()
    from hswq.loader.calibrate import calibrated
    from hswq.loader.store import path_of

    with torch.inference_mode():
        model = load_model(REFERENCE.file)
        lines: list[str] = []
        watched = calibrated(model, path_of("aware"), 1000, lines.append, STATES)
        for start in (0, 3):
            draw(watched, REFERENCE, calibration_prompts(PICTURES)[start : start + 3])
        yield model, "aware", lines


@pytest.fixture
def job(calibrated_model):
    from hswq.loader.job import Job

    with torch.inference_mode():
        model, session, _ = calibrated_model
        yield Job(model, None, None, session)


@pytest.fixture
def states(job):
    return job.states()


@pytest.fixture(scope="module")
def outcomes(calibrated_model):
    """Outcome by (format, extra)."""
    from hswq.loader.job import Job
    from hswq.loader.model_aware import plan_model_aware

    model, session, _ = calibrated_model
    known = {}

    def get(file_format: str, extra: float):
        if (file_format, extra) not in known:
            job = Job(model, None, None, session)
            known[file_format, extra] = plan_model_aware(
                job,
                job.states(),
                file_format=format_named(file_format),
                grid=FLOAT8_E4M3FN,
                extra=extra,
                progress=lambda *_: None,
            )
        return known[file_format, extra]

    return get


def test_calibration_keeps_a_sample_of_single_pictures_calls(calibrated_model, states):
    lines = calibrated_model[2]
    assert len(states) == STATES
    assert f"{STATES} states" in lines[-1]
    assert {tuple(state.tensors["x"].shape) for state in states} == {(1, 16, 16, 16)}
    assert {"c_crossattn", "y", "guidance", "sigma"} <= set(states[0].tensors)
    sigmas = [state.tensors["sigma"].item() for state in states]
    assert len(set(sigmas)) > 8  # of 20 steps
    assert len({state.tensors["y"].sum().item() for state in states}) > 3  # of 6 prompts


def test_a_state_replayed_is_the_call_it_was(calibrated_model, states):
    """Batched or alone, the output is that of the same arguments given to the model directly."""
    from hswq.loader.replay import Replay

    model, _, _ = calibrated_model
    replay = Replay(model, states)
    with replay.loaded():
        (together,) = replay.run()
        single = Replay(model, states[:1]).run()[0]
        order = [i for i in range(STATES) if torch.equal(together.x[i], single.x[0])]
        assert len(order) == 1
        torch.testing.assert_close(together.denoised[order], single.denoised, atol=1e-4, rtol=0)
        arguments = states[0].arguments("cpu")
        arguments.pop("sample_sigmas")
        direct = model.model.apply_model(arguments.pop("x"), arguments.pop("sigma"), **arguments)
    torch.testing.assert_close(single.denoised, direct)


def test_a_delta_is_the_rounded_weight_without_touching_it(calibrated_model, states):
    from hswq.loader.replay import Delta, Replay

    model, _, _ = calibrated_model
    name = "single_blocks.1.linear1"
    replay = Replay(model, states[:4])
    module = replay.modules[name]
    with replay.loaded():
        reference = replay.run()
        before = module.weight.clone()
        delta = Delta(0.01 * torch.randn_like(before), 0.01 * torch.randn(len(before)))
        change = replay.change(reference, {name: lambda: delta})
        assert torch.equal(module.weight, before)
        bias = module.bias.clone()
        module.weight.add_(delta.weight)
        module.bias.add_(delta.bias)
        by_hand = replay.change(reference, {})
        module.weight.copy_(before)
        module.bias.copy_(bias)
        assert replay.change(reference, {}) == 0.0
    assert change == pytest.approx(by_hand, rel=1e-3)
    assert not module._forward_hooks


@pytest.mark.parametrize("file_format", ["v1", "v2", "comfy"])
def test_the_plan_keeps_within_the_budget_and_closes_its_books(outcomes, job, file_format):
    outcome = outcomes(file_format, 3.0)
    plan = outcome.plan
    assert sum(plan.counts().values()) == len(job.layers)
    assert plan.counts()[SKIP] == 0
    smallest = sum(e.nbytes for e in job.source.entries.values()) - sum(p.weights for p in plan.layers)
    extra = sum(p.weights for p in plan.layers if p.action == KEEP)
    assert 0.02 * smallest < extra <= 0.03 * smallest
    assert set(outcome.solutions) == {p.name for p in plan.layers if p.action == QUANTIZE}
    assert {"img_in", "final_layer.linear"} <= {p.name for p in plan.layers if p.action == KEEP}


def test_more_bytes_keep_more_layers(outcomes):
    kept = [sum(p.action == KEEP for p in outcomes("v2", extra).plan.layers) for extra in (0.0, 3.0, 17.0)]
    assert kept[0] == 0
    assert kept[0] < kept[1] < kept[2]


def test_unseen_calls_are_served_better_than_by_nearest_rounding(outcomes):
    """Measured: 4 to 6 times less squared error."""
    for file_format in ("v1", "v2"):
        verdict = outcomes(file_format, 3.0).verdict
        assert verdict.ours < 0.5 * verdict.nearest
    assert any("on unseen calls" in line for line in outcomes("v2", 3.0).notes())


def test_the_file_holds_the_codes_and_corrected_biases(outcomes, job):
    outcome = outcomes("v2", 3.0)
    target = job.target("3pct", "v2", "")
    done, text = job.write(target, outcome.plan, lambda *_: None, outcome.solutions)
    file, source = FileSource(done.path), FileSource(REFERENCE.file)
    assert "model_aware" in text
    corrected = 0
    for name, solution in outcome.solutions.items():
        assert torch.equal(file.read(f"{name}.weight").float(), solution.codes.float())
        assert file.read(f"{name}.scale").item() == FLOAT8_E4M3FN.scale(solution.amax).item()
        if solution.bias is not None:
            wanted = (source.read(f"{name}.bias").float() + solution.bias).half()
            assert torch.equal(file.read(f"{name}.bias"), wanted)
            corrected += 1
    assert corrected > 5
    touched = {f"{name}.bias" for name in outcome.solutions}
    for key in source.entries:
        if key in file.entries and key not in touched and file.entries[key].dtype == torch.float16:
            assert torch.equal(file.read(key), source.read(key))


def test_nearest_is_written_where_it_does_better(job, states, monkeypatch, caplog):
    from hswq.loader import model_aware

    real = model_aware.solve

    def spoiled(*args, **kwargs):
        from dataclasses import replace

        found = real(*args, **kwargs)
        return replace(found, codes=torch.zeros_like(found.codes), bias=None)

    monkeypatch.setattr(model_aware, "solve", spoiled)
    with caplog.at_level(logging.WARNING):
        outcome = model_aware.plan_model_aware(
            job,
            states,
            file_format=format_named("v2"),
            grid=FLOAT8_E4M3FN,
            extra=3.0,
            progress=lambda *_: None,
        )
    assert "nearest rounding did better" in caplog.text
    assert {solution.how for solution in outcome.solutions.values()} == {"nearest"}
    for name, solution in list(outcome.solutions.items())[:5]:
        w = job.read(next(layer for layer in job.layers if layer.name == name))
        nearest, _ = FLOAT8_E4M3FN.quantize(w, solution.amax, scaled=True)
        assert torch.equal(solution.codes.float(), nearest.float())


def test_groups_under_a_memory_limit_give_the_same_codes(outcomes, job, states, monkeypatch):
    from hswq.loader import model_aware, moments

    monkeypatch.setattr(moments, "MEMORY_SHARE", 1e-9)  # every layer is a group of its own
    outcome = model_aware.plan_model_aware(
        job, states, file_format=format_named("v2"), grid=FLOAT8_E4M3FN, extra=3.0, progress=lambda *_: None
    )
    whole = outcomes("v2", 3.0)
    assert outcome.plan == whole.plan
    for name, solution in outcome.solutions.items():
        assert torch.equal(solution.codes.float(), whole.solutions[name].codes.float())


def test_layers_of_one_input_share_its_moments(job, states):
    from hswq.loader.moments import shared_inputs
    from hswq.loader.replay import Replay

    replay = Replay(job.model, states[:4])
    with replay.loaded():
        leaders = shared_inputs(replay, [layer.name for layer in job.layers])
    assert set(leaders) == {layer.name for layer in job.layers}
    assert leaders["img_in"] == "img_in"
    assert all(leaders[leaders[name]] == leaders[name] for name in leaders)


def test_cancel_leaves_hooks_and_files_behind_of_nothing(job, states):
    from hswq.loader.model_aware import plan_model_aware

    class CancelledError(Exception):
        pass

    def cancel(what: str, done: int, _total: int) -> None:
        if what.startswith("Probing") and done == 3:
            raise CancelledError

    files = sorted(job.target("x", "v2", "").parent.iterdir())
    with pytest.raises(CancelledError):
        plan_model_aware(job, states, file_format=format_named("v2"), grid=FLOAT8_E4M3FN, extra=3.0, progress=cancel)
    modules = job.model.model.diffusion_model.modules()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)
    assert sorted(job.target("x", "v2", "").parent.iterdir()) == files


def test_too_few_states_are_an_error_with_a_remedy(job, states):
    from hswq.loader.model_aware import split_states

    with pytest.raises(SessionError, match=r"got 3 model calls, expected at least 4.*states at 32"):
        split_states(states[:3])
    for count in (4, 5, 8, 24):
        parts = split_states(states[:count])
        assert all(parts)
        assert [state for part in parts for state in part] == states[:count]


def test_states_add_up_over_runs_and_stay_with_their_model(calibrated_model, job, states, caplog):
    """A second session's runs: the sample stays at its size, and a file of another model is not touched."""
    from hswq.loader.calibrate import calibrated
    from hswq.loader.store import path_of, states_path

    model, _, _ = calibrated_model
    path = path_of("aware_more")
    for count, size in ((4, 4), (4, 4), (0, 4), (8, 8)):
        lines: list[str] = []
        draw(calibrated(model, path, 1000, lines.append, count), REFERENCE, calibration_prompts(1))
        assert len(load_states(states_path(path), job.info.fingerprint, 100).states) == size
    assert not states_path(path_of("never")).exists()
