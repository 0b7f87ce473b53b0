"""Method model_aware on the trained Flux-layout model: states, replay, rounding, selection, file."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial

import pytest
import torch
from hswq.hswq_core.calibration import split
from hswq.hswq_core.calibration.states_file import load_states
from hswq.hswq_core.errors import SessionError, SettingError
from hswq.hswq_core.files.checkpoint import FileSource
from hswq.hswq_core.plan.budget import Budget
from hswq.hswq_core.plan.encoding import Encoding
from hswq.hswq_core.plan.formats import format_named
from hswq.hswq_core.plan.plan import KEEP, QUANTIZE, SKIP
from hswq.hswq_core.progress import Step, no_progress
from hswq.hswq_core.quant.grid import FLOAT8_E4M3FN
from reference_models.architectures import REFERENCES
from reference_models.prompts import calibration_prompts
from reference_models.sampling import draw
from rig.inprocess import load_model, open_fp8
from scipy.stats import spearmanr

pytestmark = pytest.mark.comfy

REFERENCE = REFERENCES["flux"]
PICTURES, STATES = 6, 24


@pytest.fixture(autouse=True)
def prompts_enough(monkeypatch) -> int:
    """Six prompts count as enough here: drawing more would take most of the time. Returns the real number."""
    real = split.ENOUGH_PROMPTS
    monkeypatch.setattr(split, "ENOUGH_PROMPTS", 1)
    return real


@pytest.fixture(scope="module")
def calibrated_model():
    """The model, and the name of a session with states; everything in inference mode, as in the server."""
    from rig import inprocess

    inprocess.load_comfy()
    from hswq.loader.calibration.model import calibrated
    from hswq.loader.sessions.store import path_of

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
        yield Job.open(model, None, None, session)


@pytest.fixture
def states(job):
    return job.states()


@pytest.fixture(scope="module")
def outcomes(calibrated_model):
    """Outcome by (format, extra)."""
    from hswq.loader.job import Job

    model, session, _ = calibrated_model
    known = {}

    def get(file_format: str, extra: float):
        if (file_format, extra) not in known:
            job = Job.open(model, None, None, session)
            outcome = planned(job, job.states(), file_format, extra)
            known[file_format, extra] = replace(outcome, solutions=dict(outcome.solutions))  # the folder is shared
        return known[file_format, extra]

    return get


def planned(job, states, file_format: str = "v2", extra: float = 3.0, progress=no_progress, **options):
    from hswq.loader.convert.methods import MODEL_AWARE
    from hswq.loader.convert.model import task_for
    from hswq.loader.model_aware.plan import plan_model_aware

    encoding = Encoding(format_named(file_format), **options)
    return plan_model_aware(task_for(job, MODEL_AWARE, encoding, progress, states), Budget(extra))


def test_calibration_keeps_a_sample_of_single_pictures_calls(calibrated_model, states):
    lines = calibrated_model[2]
    assert len(states) == STATES
    assert " calls · saved " in lines[-1]
    assert {tuple(state.tensors["x"].shape) for state in states} == {(1, 16, 16, 16)}
    assert {"c_crossattn", "y", "guidance", "sigma"} <= set(states[0].tensors)
    sigmas = [state.tensors["sigma"].item() for state in states]
    assert len(set(sigmas)) > 8  # of 20 steps
    assert len({state.tensors["y"].sum().item() for state in states}) > 3  # of 6 prompts


def test_a_state_replayed_is_the_call_it_was(calibrated_model, states):
    """Batched or alone, the output equals that of the same arguments passed to the model directly."""
    from hswq.loader.replay.replay import Replay

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
    from hswq.loader.replay.replay import Delta, Replay

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
    assert set(outcome.solutions) == {p.name for p in plan.layers}
    assert {"img_in", "final_layer.linear"} <= {p.name for p in plan.layers if p.action == KEEP}


def test_a_file_of_the_size_asked_for(calibrated_model):
    """Nearly the full budget, never over; and nothing new in the sessions folder."""
    from hswq.loader.convert.model import Request, convert_model

    model, session, _ = calibrated_model
    with torch.inference_mode():
        request = Request(session, "v2", "model_aware", target_mb=11)
        done = convert_model(model, None, None, request, no_progress)
        assert 10.5 * 2**20 < done.path.stat().st_size <= 11 * 2**20
        assert done.path.name.endswith("_11mb_v2.safetensors")
        assert "method model_aware 11mb" in done.report
        assert not list(done.path.parent.parent.glob("hswq_stats/*.work"))
        with pytest.raises(SettingError, match="target_mb: got 5, expected at least 9"):
            convert_model(model, None, None, Request(session, "v2", "model_aware", target_mb=5), no_progress)


def test_convolutions_are_rounded_and_chosen_too(tmp_path):
    """The UNet's convolutions are unscaled in comfy, and still far better than nearest."""
    from hswq.loader.job import Job
    from judge.subject import Subject

    subject = Subject(REFERENCES["sdxl"], 3, states=16)
    with torch.inference_mode():
        job = Job.open(subject.model, None, None, subject.session)
        outcome = planned(job, job.states(), "comfy")
        done = job.write(job.target("conv", "comfy", ""), outcome.plan, no_progress, outcome.solutions)
    convs = [p for p in outcome.plan.layers if p.kind == "Conv2d" and p.action == QUANTIZE]
    assert len(convs) > 20
    assert not any(p.scaled for p in convs)
    assert sum(p.reason == "compensated" for p in convs) > len(convs) / 2
    assert outcome.errors["model_aware"] < 0.25 * min(outcome.errors["nearest"], outcome.errors["hswq"])
    assert done.size < 0.55 * done.source_bytes


def test_more_bytes_keep_more_layers(outcomes):
    kept = [sum(p.action == KEEP for p in outcomes("v2", extra).plan.layers) for extra in (0.0, 3.0, 17.0)]
    assert kept[0] == 0
    assert kept[0] < kept[1] < kept[2]


def test_unseen_calls_are_served_better_than_by_any_other_use_of_the_bytes(outcomes):
    """Measured: 4 to 6 times lower squared error than nearest."""
    for file_format in ("v1", "v2"):
        errors = dict(outcomes(file_format, 3.0).errors)
        ours = errors.pop("model_aware")
        assert set(errors) == {"hswq", "nearest"} | ({"plain cast"} if file_format == "v2" else set())
        assert all(ours < 0.5 * other for other in errors.values())
    assert any("on unseen calls" in line for line in outcomes("v2", 3.0).notes())


def test_the_plan_tells_what_each_layer_was_worth(outcomes):
    plan = outcomes("v2", 3.0).plan
    assert all(layer.change >= 0 for layer in plan.layers)
    assert all(layer.numbers["damping"] >= 0.01 for layer in plan.layers if layer.reason == "compensated")
    kept = [layer.change / layer.weights for layer in plan.layers if layer.action == KEEP]
    assert max(kept) > 100 * min(layer.change / layer.weights for layer in plan.layers)
    assert any("largest damping" in line for line in outcomes("v2", 3.0).notes())


def test_the_file_holds_the_codes_and_corrected_biases(outcomes, job):
    outcome = outcomes("v2", 3.0)
    target = job.target("3pct", "v2", "")
    done = job.write(target, outcome.plan, no_progress, outcome.solutions)
    file, source = FileSource(done.path), FileSource(REFERENCE.file)
    assert "model_aware" in done.report
    corrected = 0
    quantized = [layer.name for layer in outcome.plan.layers if layer.action == QUANTIZE]
    for name in quantized:
        solution = outcome.solutions[name]
        assert torch.equal(file.read(f"{name}.weight").float(), solution.codes.float())
        assert file.read(f"{name}.scale").item() == solution.scale.item()
        if solution.bias is not None:
            wanted = (source.read(f"{name}.bias").float() + solution.bias).half()
            assert torch.equal(file.read(f"{name}.bias"), wanted)
            corrected += 1
    assert corrected > 5
    touched = {f"{name}.bias" for name in quantized}
    for key in source.entries:
        if key in file.entries and key not in touched and file.entries[key].dtype == torch.float16:
            assert torch.equal(file.read(key), source.read(key))


def test_what_does_better_is_written_and_told(job, states, monkeypatch, caplog, tmp_path):
    """With spoiled codes every other candidate is better; the file holds the best of them."""
    from hswq.loader.model_aware import solver

    real = solver.solve

    def spoiled(*args, **kwargs):
        found = real(*args, **kwargs)
        return replace(found, tensors=found.tensors | {"weight": torch.zeros_like(found.codes)}, bias=None)

    monkeypatch.setattr(solver, "solve", spoiled)
    monkeypatch.setattr(type(job), "work_folder", tmp_path / "spoiled.work")
    with caplog.at_level(logging.WARNING):
        outcome = planned(job, states)
    best = min(outcome.errors, key=outcome.errors.get)
    assert best != "model_aware"
    assert f"{best} did better than model_aware" in caplog.text
    assert any(f"{best} did better" in line for line in outcome.notes())
    assert not outcome.solutions
    done = job.write(job.target("spoiled", "v2", ""), outcome.plan, no_progress, outcome.solutions)
    file = FileSource(done.path)
    quantized = [layer for layer in outcome.plan.layers if layer.action == QUANTIZE]
    assert {layer.reason for layer in quantized} <= {"nearest", "cast"}
    for layer in quantized[:5]:
        w = job.read(job.by_name[layer.name])
        nearest = layer.stored.nearest_tensors(w, layer.amax)["weight"]
        assert torch.equal(file.read(f"{layer.name}.weight").float(), nearest.float())


def test_of_a_large_model_only_the_likely_layers_are_probed(outcomes, job, states, monkeypatch, tmp_path):
    """Likely by their own error per byte, several times the budget; the others are estimated from those."""
    from hswq.loader.model_aware import probe
    from hswq.loader.model_aware.probe import shortlist

    whole = outcomes("v2", 3.0)
    monkeypatch.setattr(probe, "LEAST_LAYERS", 4)
    monkeypatch.setattr(type(job), "work_folder", tmp_path / "likely.work")
    seen: list[str] = []
    outcome = planned(job, states, progress=lambda step, *_: seen.append(step))
    probed = [step.subject for step in seen if step.stage == "Probing"]
    cost = {name: job.by_name[name].weights for name in outcome.solutions}
    error = {name: outcome.solutions[name].error for name in cost}
    budget = Budget(3.0).extra_bytes(job.smallest(Encoding(format_named("v2"))), len(cost))
    assert probed == shortlist(error, cost, budget)
    assert 4 < len(probed) < len(cost)
    assert 4 * budget <= sum(cost[name] for name in probed) <= 4 * budget + max(cost.values())
    change = {layer.name: layer.change for layer in outcome.plan.layers}
    ratios = sorted(change[name] / error[name] for name in cost)
    assert all(ratios[0] < change[name] / error[name] < ratios[-1] for name in set(cost) - set(probed))
    assert outcome.errors["model_aware"] < 1.5 * whole.errors["model_aware"]


def test_large_pictures_are_probed_by_their_middle(outcomes, job, states, monkeypatch, tmp_path):
    """A quarter of each picture here: it ranks layers nearly as the whole picture does."""
    from hswq.loader.model_aware import probe

    whole = outcomes("v2", 3.0)
    side = states[0].tensors["x"].shape[-1] // 2
    seen: list[tuple[int, ...]] = []
    real = probe.Replay

    def replay(model, found):
        seen.extend(tuple(state.tensors["x"].shape[2:]) for state in found)
        return real(model, found)

    monkeypatch.setattr(probe, "MOST_SIDE", side)
    monkeypatch.setattr(probe, "Replay", replay)
    monkeypatch.setattr(type(job), "work_folder", tmp_path / "middle.work")
    middle = planned(job, states)
    assert set(seen) == {(side, side)}
    change = {layer.name: layer.change for layer in whole.plan.layers}
    found = {layer.name: layer.change for layer in middle.plan.layers}
    assert found != change
    assert spearmanr(list(change.values()), [found[name] for name in change]).statistic > 0.8
    assert middle.errors["model_aware"] < 1.5 * whole.errors["model_aware"]


def test_a_crash_loses_only_the_layer_at_hand(job, states, monkeypatch, tmp_path):
    from hswq.loader.model_aware import solver

    monkeypatch.setattr(type(job), "work_folder", tmp_path / "crash.work")
    solved: list[str] = []
    real = solver.solve

    def solve(layer, *args, **kwargs):
        solved.append(layer.name)
        if len(solved) == 20:
            raise MemoryError
        return real(layer, *args, **kwargs)

    monkeypatch.setattr(solver, "solve", solve)
    with pytest.raises(MemoryError):
        planned(job, states)
    outcome = planned(job, states)
    again = solved[20:]
    assert len(again) == len(job.layers) - 19
    assert set(again).isdisjoint(solved[:19])
    assert set(solved) == {layer.name for layer in outcome.plan.layers}

    seen: list[str] = []
    repeated = planned(job, states, progress=lambda step, *_: seen.append(step))
    assert not any(step.stage in ("Rounding", "Probing") for step in seen)
    assert repeated.plan == outcome.plan
    assert planned(job, states[:20]).plan != outcome.plan  # nothing is reused from other states
    assert len(solved) == 20 + len(again) + len(job.layers)


def test_an_error_keeps_the_work_cancel_and_success_do_not(calibrated_model, monkeypatch):
    import comfy.model_management
    from filelock import FileLock
    from hswq.loader.convert.model import Request, convert_model
    from hswq.loader.model_aware import solver
    from hswq.loader.sessions.store import path_of

    model, session, _ = calibrated_model
    folder = path_of(session).with_suffix(".work")
    real, solved = solver.solve, []

    def failing(error: type[BaseException]):
        def solve(layer, *args, **kwargs):
            solved.append(layer.name)
            if len(solved) == 5:
                raise error
            return real(layer, *args, **kwargs)

        return solve

    request = Request(session, "v1", "model_aware", extra_percent=4.0)
    for error, left in ((MemoryError, True), (comfy.model_management.InterruptProcessingException, False)):
        solved.clear()
        monkeypatch.setattr(solver, "solve", failing(error))
        with torch.inference_mode(), pytest.raises(error):
            convert_model(model, None, None, request, no_progress)
        assert folder.exists() == left
    with FileLock(f"{folder}.lock"), pytest.raises(SessionError, match="another conversion of it under way"):
        convert_model(model, None, None, request, no_progress)
    monkeypatch.setattr(solver, "solve", real)
    with torch.inference_mode():
        done = convert_model(model, None, None, request, no_progress)
    assert done.path.exists()
    assert not folder.exists()


def test_groups_under_a_memory_limit_give_the_same_codes(outcomes, job, states, monkeypatch, tmp_path):
    from hswq.loader.model_aware import gather as moments

    monkeypatch.setattr(moments, "MEMORY_SHARE", 1e-9)  # every layer is its own group
    monkeypatch.setattr(type(job), "work_folder", tmp_path / "groups.work")
    outcome = planned(job, states)
    whole = outcomes("v2", 3.0)
    assert outcome.plan == whole.plan
    for name, solution in outcome.solutions.items():
        assert torch.equal(solution.codes.float(), whole.solutions[name].codes.float())


def test_layers_of_one_input_share_its_moments(job, states):
    from hswq.loader.model_aware.gather import shared_inputs
    from hswq.loader.replay.replay import Replay

    replay = Replay(job.model, states[:4])
    with replay.loaded():
        seen = shared_inputs(replay, [layer.name for layer in job.layers])
    leaders = seen.leader
    assert set(leaders) == {layer.name for layer in job.layers}
    assert leaders["img_in"] == "img_in"
    assert all(leaders[leaders[name]] == leaders[name] for name in leaders)
    assert set(seen.rows) == set(leaders.values())
    assert seen.rows["img_in"] == 4 * 8 * 8  # four states of 16 x 16 latents in patches of 2 x 2


def test_cancel_leaves_no_hooks_and_no_file(job, states, monkeypatch, tmp_path):
    monkeypatch.setattr(type(job), "work_folder", tmp_path / "cancelled.work")

    class CancelledError(Exception):
        pass

    def cancel(step: Step, done: int, _total: int) -> None:
        if step.stage == "Probing" and done == 3:
            raise CancelledError

    files = sorted(job.target("x", "v2", "").parent.iterdir())
    with pytest.raises(CancelledError):
        planned(job, states, extra=2.0, progress=cancel)
    modules = job.model.model.diffusion_model.modules()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)
    assert sorted(job.target("x", "v2", "").parent.iterdir()) == files


def test_variety_is_pictures_of_other_prompts(job, states):
    from hswq.loader.replay.replay import Replay
    from hswq.loader.replay.variety import PICTURES, STEPS, varied

    with Replay(job.model, states).loaded():
        pictures = varied(job.model, states[:3], no_progress)
        again = varied(job.model, states[:3], no_progress)
        plain = [replace(s, tensors={k: v for k, v in s.tensors.items() if k != "sample_sigmas"}) for s in states]
        assert varied(job.model, plain, no_progress) == []
        short = replace(states[0], tensors={**states[0].tensors, "sample_sigmas": torch.tensor([1.0, 0.4, 0.0])})
        brief = varied(job.model, [short], no_progress)
        broken = replace(states[0], tensors={**states[0].tensors, "y": torch.full_like(states[0].tensors["y"], 1e30)})
        assert varied(job.model, [broken], no_progress) == []  # overflows
    assert [len(picture) for picture in pictures] == [STEPS] * PICTURES
    assert [[state.tensors["sigma"].item() for state in picture] for picture in brief] == [
        [1.0, pytest.approx(0.4)]
    ] * PICTURES
    assert torch.equal(pictures[3][5].tensors["x"], again[3][5].tensors["x"])
    bases = {state.prompt: state for state in states[:3]}
    for number, picture in enumerate(pictures):
        base = list(bases.values())[number % len(bases)].tensors
        for state in picture:
            ratio = state.tensors["y"] / base["y"]
            assert set(ratio[base["y"] != 0].unique().tolist()) == {-1.0, 1.0}
            require_shuffled_and_flipped(state.tensors["c_crossattn"], base["c_crossattn"])
        assert torch.equal(picture[0].tensors["guidance"], base["guidance"])
        sigmas = [state.tensors["sigma"].item() for state in picture]
        assert sigmas == sorted(sigmas, reverse=True)
        assert sigmas[0] == base["sample_sigmas"][0]
        assert picture[0].tensors["x"].std() == pytest.approx(sigmas[0], rel=0.1)
        assert picture[-1].tensors["x"].isfinite().all()
    assert len({state.prompt for picture in pictures for state in picture}) == PICTURES * STEPS


def require_shuffled_and_flipped(tokens: torch.Tensor, base: torch.Tensor) -> None:
    """[1, T, C]: the tokens of ``base`` in another order, some channels flipped in sign, the same for all tokens."""
    (tokens,), (base,) = tokens, base
    order = [int((base.abs() == token.abs()).all(1).nonzero()[0]) for token in tokens]
    assert sorted(base[order].abs().sum(1)) == sorted(base.abs().sum(1))
    assert order != list(range(len(base)))
    signs = (tokens / base[order]).nan_to_num().sum(0).sign()
    assert set(signs.tolist()) == {-1.0, 1.0}
    assert torch.equal(tokens, base[order] * signs)


def test_one_picture_calibrates_for_other_prompts_through_variety(
    calibrated_model, states, monkeypatch, tmp_path, prompts_enough
):
    """Judged on calls of five other prompts; measured 5 dB less error, 2 dB are required."""
    from hswq.loader.calibration.model import calibrated
    from hswq.loader.job import Job
    from hswq.loader.model_aware import plan as model_aware
    from hswq.loader.model_aware.rounder import Rounder
    from hswq.loader.replay.replay import Replay
    from hswq.loader.sessions.store import path_of

    monkeypatch.setattr(split, "ENOUGH_PROMPTS", prompts_enough)
    model, _, _ = calibrated_model
    draw(calibrated(model, path_of("one"), 1000, lambda _line: None), REFERENCE, calibration_prompts(1))
    job, errors = Job.open(model, None, None, "one"), []
    own = {state.prompt for state in job.states()}
    others = Replay(model, [state for state in states if state.prompt not in own])
    for drawn in (model_aware.varied, lambda *_: []):
        monkeypatch.setattr(model_aware, "varied", drawn)
        monkeypatch.setattr(type(job), "work_folder", tmp_path / f"{len(errors)}.work")
        outcome = planned(job, job.states())
        rounder = Rounder(job, Encoding(format_named("v2")), outcome.solutions)
        names = [layer.name for layer in outcome.plan.layers if layer.action == QUANTIZE]
        with others.loaded():
            errors.append(others.change(others.run(), {name: partial(rounder.delta, name) for name in names}))
    assert errors[0] < 0.63 * errors[1]


def test_states_add_up_over_runs_and_stay_with_their_model(calibrated_model, job, states, caplog):
    """A second session's runs: the sample keeps its size, and a file of another model is not touched."""
    from hswq.hswq_core.calibration.states_file import states_path
    from hswq.loader.calibration.model import calibrated
    from hswq.loader.sessions.store import path_of

    model, _, _ = calibrated_model
    path = path_of("aware_more")
    for count, size in ((4, 4), (4, 4), (0, 4), (8, 8)):
        lines: list[str] = []
        draw(calibrated(model, path, 1000, lines.append, count), REFERENCE, calibration_prompts(1))
        assert len(load_states(states_path(path), job.info.fingerprint, 100).states) == size
    assert not states_path(path_of("never")).exists()


def test_a_scale_a_channel_opens_in_hswq_loader(job, states, outcomes, monkeypatch, tmp_path):
    whole = outcomes("v2", 3.0)
    monkeypatch.setattr(type(job), "work_folder", tmp_path / "channel.work")
    outcome = planned(job, states, granularity="channel")
    assert outcome.errors["model_aware"] < 1.2 * whole.errors["model_aware"]
    done = job.write(job.target("channel", "v2", ""), outcome.plan, no_progress, outcome.solutions)
    file, opened = FileSource(done.path), open_fp8(done.path)
    modules = dict(opened.model.diffusion_model.named_modules())
    quantized = [layer for layer in outcome.plan.layers if layer.action == QUANTIZE]
    assert quantized
    for layer in quantized:
        assert file.entries[f"{layer.name}.scale"].shape == (layer.shape[0],)
        wanted = outcome.solutions[layer.name].restored(torch.device("cpu"))
        assert torch.equal(modules[layer.name].weight.to(torch.float32).dequantize(), wanted)
    assert done.plan.granularity == "channel"


def test_fast_matmul_where_it_costs_little(job, states, outcomes, monkeypatch, tmp_path):
    """Stock ComfyUI, made to believe in FP8 compute, casts these layers' inputs with the measured scales."""
    import comfy.model_management
    from hswq.loader.model_aware import fast_matmul as fast

    whole = outcomes("comfy", 3.0)
    monkeypatch.setattr(type(job), "work_folder", tmp_path / "fast.work")
    outcome = planned(job, states, "comfy", 3.0, fast_matmul=3.0)
    chosen = [layer for layer in outcome.plan.layers if layer.input_amax]
    assert chosen
    assert all(layer.action == QUANTIZE and layer.scaled for layer in chosen)
    assert replace(outcome.plan, layers=tuple(replace(layer, input_amax=0.0) for layer in outcome.plan.layers)) == (
        whole.plan
    )
    for layer in chosen:
        assert layer.input_amax == fast.INPUT_MARGIN * job.session.layers[layer.name].input_amax
    assert f"fast matmul: {len(chosen)} of " in outcome.notes()[-1]

    done = job.write(job.target("fast", "comfy", ""), outcome.plan, no_progress, outcome.solutions)
    monkeypatch.setattr(comfy.model_management, "SUPPORT_FP8_OPS", True)
    opened = load_model(done.path)
    modules = dict(opened.model.diffusion_model.named_modules())
    for layer in outcome.plan.layers:
        if layer.action == QUANTIZE:
            assert modules[layer.name]._full_precision_mm != bool(layer.input_amax)
        if layer.input_amax:
            scale = FLOAT8_E4M3FN.scale(layer.input_amax).item()
            assert modules[layer.name].input_scale.item() == scale
    found, wanted = (_denoised(model, states) for model in (opened, job.model))
    change = _change(found, wanted)
    slow = _change(_denoised(load_model(_written(job, whole)), states), wanted)
    assert slow < change < 2.5 * slow


def _written(job, outcome):
    return job.write(job.target("slow", "comfy", ""), outcome.plan, no_progress, outcome.solutions).path


def _denoised(model, states):
    from hswq.loader.replay.replay import Replay

    replay = Replay(model, states)
    with torch.inference_mode(), replay.loaded():
        return replay.run()


def _change(found, wanted) -> float:
    pairs = list(zip(found, wanted, strict=True))
    change = sum((a.denoised - b.denoised).square().sum() for a, b in pairs)
    return (change / sum((b.x - b.denoised).square().sum() for _, b in pairs)).item()
