from __future__ import annotations

import json

import pytest
import torch
from hswq.hswq_core.cli.main import main
from hswq.hswq_core.errors import LayerError, SettingError
from hswq.hswq_core.files.checkpoint import FileSource
from hswq.hswq_core.methods.exclusions import Exclusions
from hswq.hswq_core.methods.learned import LEARNED_CODES, RIDGE, LearnedOptions, input_moments, learn, plan_learned
from hswq.hswq_core.methods.method import Task
from hswq.hswq_core.methods.solve import NEAREST, Solution
from hswq.hswq_core.model.families import GENERIC
from hswq.hswq_core.model.layer import Layer
from hswq.hswq_core.plan.encoding import Encoding
from hswq.hswq_core.plan.formats import format_named
from hswq.hswq_core.plan.plan import QUANTIZE, Plan
from hswq.hswq_core.progress import Step
from hswq.hswq_core.quant.descent import Descent, LowRank
from hswq.hswq_core.quant.gptq import compensated
from hswq.hswq_core.quant.grid import FLOAT8_E4M3FN
from hswq.hswq_core.quant.metrics import sqnr_db
from hswq.hswq_core.quant.schemes.table import SCHEMES
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

GRID = FLOAT8_E4M3FN
FP8, CAST = SCHEMES["fp8"], SCHEMES["fp8_cast"]
OPTIONS = LearnedOptions()
PREFIX = "model.diffusion_model."


def low_rank(out: int, k: int, rank: int = 6, seed: int = 1) -> torch.Tensor:
    """A weight that looks mostly into a few directions, as trained ones do."""
    g = torch.Generator().manual_seed(seed)
    made = torch.randn(out, rank, generator=g) @ torch.randn(rank, k, generator=g)
    return 0.02 * (made + 0.3 * torch.randn(out, k, generator=g))


def scale_of(w: torch.Tensor) -> torch.Tensor:
    return GRID.scale(w.abs().max())


def errors_of(w: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """Ŵ - W in units of the scale, float64 [out, k]."""
    unit = 1.0 if scale is None else scale.double()
    return (codes.double() - w.double() / unit).flatten(1)


def quantized_loss(w: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor | None) -> float:
    """The formula of the module's docstring, with the dense G, in float64."""
    unit = 1.0 if scale is None else scale
    moments = input_moments(w.flatten(1).float() / unit, OPTIONS)
    a = moments.a.double()
    gram = a @ a.T + RIDGE * torch.eye(len(a), dtype=torch.float64)
    error, signal = errors_of(w, codes, scale), w.flatten(1).double() / unit
    return (torch.trace(error @ gram @ error.T) / torch.trace(signal @ gram @ signal.T)).item()


def nearest_codes(w: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    return GRID.cast(w.float() / (1.0 if scale is None else scale))


class TestDescent:
    def test_without_sweeps_it_is_compensated_rounding(self):
        w, moments = torch.randn(24, 100) * 3, LowRank(torch.randn(100, 7), 0.5)
        gram = moments.a @ moments.a.T + 0.5 * torch.eye(100)
        dense = compensated(w, gram, GRID.nearest, damping=1e-9).weight
        found = Descent(moments).rounded(w, GRID.nearest, sweeps=0, tick=lambda: None)
        assert (found != dense).float().mean() < 0.01  # a value on the edge between two codes may fall either way
        assert (found != GRID.nearest(w)).float().mean() > 0.1

    def test_no_other_code_of_any_one_weight_is_better(self, monkeypatch):
        """All 253 values of the grid, tried at every weight: subnormals, zero, both signs, the ends."""
        from hswq.hswq_core.quant import descent

        monkeypatch.setattr(descent, "LEAST_GAIN", 1e-12)
        w = torch.randn(6, 40) * torch.logspace(-3, 2.7, 40)
        moments = LowRank(torch.randn(40, 5), 0.3)
        found = Descent(moments).rounded(w, GRID.nearest, sweeps=500, tick=lambda: None).double()
        a, values = moments.a.double(), GRID.values().double()
        gram = a @ a.T + 0.3 * torch.eye(40, dtype=torch.float64)
        error = found - w.double()
        loss = ((error @ gram) * error).sum(1)
        for j in range(40):
            tried = values[:, None] - w[:, j].double() - error[:, j]  # change of the error
            changed = loss + 2 * tried * (error @ gram)[:, j] + tried.square() * gram[j, j]
            assert (changed >= loss * (1 - 1e-5)).all()

    def test_sweeps_never_raise_the_loss_and_stop_when_they_gain_nothing(self):
        w, moments = torch.randn(32, 64) * 3, LowRank(torch.randn(64, 8), 0.5)
        made, ticks = Descent(moments), []

        def loss(sweeps: int) -> float:
            ticks.clear()
            found = made.rounded(w, GRID.nearest, sweeps=sweeps, tick=lambda: ticks.append(1))
            return moments.losses(found - w).sum().item()

        losses = [loss(sweeps) for sweeps in (0, 1, 2, 4)]
        assert losses == sorted(losses, reverse=True)
        assert losses[1] < losses[0]
        loss(1000)
        assert len(ticks) < 100

    def test_values_beyond_the_grid_end_on_it(self):
        w = torch.randn(8, 32) * 1000
        found = Descent(LowRank(torch.randn(32, 4), 0.5)).rounded(w, GRID.nearest, sweeps=3, tick=lambda: None)
        assert torch.equal(GRID.nearest(found), found)
        assert found.abs().max() == GRID.max


class TestLearn:
    @pytest.mark.parametrize("scaled", [True, False])
    @pytest.mark.parametrize("shape", [(48, 96), (1, 300), (300, 2), (24, 8, 3, 3), (1100, 40)])
    def test_the_losses_are_those_of_the_codes(self, shape, scaled):
        w = low_rank(shape[0], torch.Size(shape[1:]).numel()).reshape(shape)
        scale = scale_of(w) if scaled else None
        found = learn(w, FP8 if scaled else CAST, OPTIONS)
        assert found.codes.shape == w.shape
        assert found.scheme == ("fp8" if scaled else "fp8_cast")
        assert (found.scale is None) if scale is None else torch.equal(found.scale, scale)
        assert found.error == pytest.approx(quantized_loss(w, found.codes, scale), rel=1e-4)
        assert found.nearest_error == pytest.approx(quantized_loss(w, nearest_codes(w, scale), scale), rel=1e-4)
        assert found.error <= found.nearest_error

    @given(
        st.integers(1, 20), st.integers(1, 40), st.sampled_from([1e-30, 1e-3, 1.0, 300.0]), st.sampled_from([1, 3, 9])
    )
    @settings(max_examples=40, deadline=None)
    def test_never_worse_than_nearest_in_any_row(self, out, k, size, power):
        w = torch.randn(out, k).pow(power) * size  # odd powers: heavy tails
        scale = scale_of(w)
        found = learn(w, FP8, OPTIONS)
        moments = input_moments(w / scale, OPTIONS)
        losses = moments.losses(found.codes.float() - w / scale)
        nearest = moments.losses(nearest_codes(w, scale).float() - w / scale)
        assert (losses <= nearest * (1 + 1e-6)).all()
        assert (found.how == LEARNED_CODES) == (found.error < found.nearest_error)

    def test_what_the_weight_looks_at_gains_and_nothing_goes_free(self):
        """On weights of low rank: known scripts lose outside the subspace, and most of the gain by their last cast."""
        w = low_rank(96, 128)
        scale = scale_of(w)
        found = learn(w, FP8, OPTIONS)
        assert found.error < 0.9 * found.nearest_error
        error, nearest = (errors_of(w, codes, scale) for codes in (found.codes, nearest_codes(w, scale)))
        assert (error != nearest).double().mean() > 0.01  # more than a shift of a few codes
        _, _, v = torch.linalg.svd(w.double(), full_matrices=False)
        seen, rest = v[:6].T, v[6:].T
        assert (error @ seen).square().sum() < 0.5 * (nearest @ seen).square().sum()
        assert (error @ rest).square().sum() < 1.3 * (nearest @ rest).square().sum()
        moments = input_moments(w / scale, OPTIONS)
        bound = moments.losses(nearest.float()).sum() / RIDGE
        assert error.square().sum() <= bound

    def test_inputs_along_the_weights_directions_change_the_outputs_less(self):
        w = low_rank(96, 128)
        scale = scale_of(w)
        _, _, v = torch.linalg.svd(w, full_matrices=False)
        x = torch.randn(500, 6) @ v[:6] + 0.05 * torch.randn(500, 128)
        found = learn(w, FP8, OPTIONS)
        changes = [
            (x @ errors_of(w, c, scale).float().T).square().mean() for c in (found.codes, nearest_codes(w, scale))
        ]
        assert changes[0] < 0.6 * changes[1]

    def test_a_zero_weight_is_nearest(self):
        found = learn(torch.zeros(16, 16), FP8, OPTIONS)
        assert (found.how, found.error, found.nearest_error) == (NEAREST, 0.0, 0.0)
        assert not found.codes.float().any()

    def test_the_largest_weight_keeps_the_scale(self):
        w = low_rank(96, 128)
        found = learn(w, FP8, OPTIONS)
        assert found.codes.float().abs().max() == GRID.max

    def test_the_seed_decides_and_the_callers_randomness_is_left_alone(self):
        w = torch.randn(200, 180)  # no gap after 64 directions: the decomposition is an estimate
        state = torch.get_rng_state()
        first = learn(w, FP8, OPTIONS)
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(99)
        again, other = learn(w, FP8, OPTIONS), learn(w, FP8, LearnedOptions(seed=1))
        assert torch.equal(first.codes.float(), again.codes.float())
        assert not torch.equal(first.codes.float(), other.codes.float())

    def test_blocks_of_rows_do_not_matter(self, monkeypatch):
        from hswq.hswq_core.methods import learned

        w = low_rank(70, 64)
        whole = learn(w, FP8, OPTIONS).error
        monkeypatch.setattr(learned, "ROWS", 16)
        # each block ends its sweeps for itself
        assert learn(w, FP8, OPTIONS).error == pytest.approx(whole, rel=0.02)

    def test_neither_weight_nor_scale_is_changed(self):
        w = low_rank(32, 48)
        before = (w.clone(), scale_of(w))
        for scheme in (FP8, CAST):
            found = learn(w, scheme, OPTIONS)
            assert torch.equal(w, before[0])
            assert found.scale is None or torch.equal(found.scale, before[1])

    def test_a_clip_limit_is_where_the_codes_end(self):
        w = low_rank(96, 128)
        top = w.abs().max().item()
        found = learn(w, FP8, OPTIONS, amax=top / 2)
        assert torch.equal(found.scale, GRID.scale(top / 2))
        assert found.codes.float().abs().max() == GRID.max
        assert found.restored(torch.device("cpu")).abs().max().item() == pytest.approx(top / 2, rel=1e-6)
        clipped = learn(w, CAST, OPTIONS, amax=top / 2)
        assert torch.equal(learn(w.clamp(-top / 2, top / 2), CAST, OPTIONS).codes.float(), clipped.codes.float())
        whole = learn(w, FP8, OPTIONS)
        assert torch.equal(learn(w, FP8, OPTIONS, amax=top).codes.float(), whole.codes.float())


@pytest.mark.parametrize("bad", [{"iterations": -1}, {"samples": 0}, {"seed": -1}])
def test_settings_out_of_range_are_errors_that_name_them(bad):
    with pytest.raises(SettingError, match=f"{next(iter(bad))}: got"):
        LearnedOptions(**bad)


class Memory(dict[str, Solution]):
    """Solutions that need no disk."""

    def add(self, name: str, solution: Solution) -> None:
        self[name] = solution


def planned(weights: dict[str, torch.Tensor], name: str = "v2", **options) -> tuple[Plan, dict[str, Solution]]:
    layers = [Layer(n, "Linear" if w.dim() == 2 else "Conv2d", tuple(w.shape), w.dtype) for n, w in weights.items()]
    task = Task(
        layers=layers,
        read=lambda layer: weights[layer.name],
        exclusions=Exclusions(GENERIC, tiny=0),
        encoding=Encoding(format_named(name)),
        solutions=Memory(),
        **options,
    )
    found = plan_learned(task, LearnedOptions())
    assert found.solutions is task.solutions
    assert found.notes == ()
    return found.plan, task.solutions


class TestPlan:
    def test_learned_layers_are_solved_the_others_nearest(self):
        weights = {
            "l": low_rank(64, 96),
            "zero": torch.zeros(80, 80),
            "skip": torch.randn(80, 80, 1, 1),
            "few": low_rank(63, 96),
        }
        plan, solutions = planned(weights)
        assert [(layer.action, layer.reason) for layer in plan.layers] == [
            (QUANTIZE, LEARNED_CODES),
            *[(QUANTIZE, NEAREST)] * 3,
        ]
        assert (plan.method, set(solutions)) == ("learned", {"l"})
        assert (plan.layers[0].numbers["loss"], plan.layers[0].numbers["nearest_loss"]) == (
            solutions["l"].error,
            solutions["l"].nearest_error,
        )
        stored = solutions["l"].restored(torch.device("cpu"))
        assert plan.layers[0].sqnr_db == pytest.approx(sqnr_db(weights["l"], stored), abs=1e-9)
        assert Plan.from_json(plan.to_json()) == plan

    def test_cancel_is_answered_within_a_layer(self):
        calls = []

        def cancel(step: Step, done: int, total: int) -> None:
            calls.append((step, done, total))
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            planned({"l": low_rank(64, 96)}, progress=cancel)
        assert calls == [(Step("Learning", "l"), 0, 4 * 64 * 96)]

    def test_what_cannot_be_rounded_is_an_error(self):
        w = torch.randn(16, 16)
        with pytest.raises(LayerError, match=r"Layer l.*already FP8"):
            planned({"l": w.to(torch.float8_e4m3fn)})
        w[1, 1] = torch.nan
        with pytest.raises(LayerError, match="Layer l, weight: got NaN"):
            planned({"l": w})


class TestCommandLine:
    @pytest.fixture
    def model(self, tmp_path):
        names = {"input_blocks.0.0": (8, 4, 3, 3), "label_emb.0.0": (256, 128), "middle_block.0.conv": (64, 32, 3, 3)}
        names |= {"middle_block.1.to_q": (192, 192), "out.2": (4, 8, 3, 3)}
        state = {}
        for n, (name, shape) in enumerate(names.items()):
            w = low_rank(shape[0], torch.Size(shape[1:]).numel(), seed=n).reshape(shape)
            state[f"{PREFIX}{name}.weight"], state[f"{PREFIX}{name}.bias"] = w.half(), torch.randn(shape[0]).half()
        save_file(state, tmp_path / "model.safetensors")
        return tmp_path / "model.safetensors"

    @pytest.mark.parametrize("name", ["v1", "v2", "comfy"])
    def test_a_sound_file_whose_losses_are_true(self, model, name, capsys):
        asked = ["-q", "convert", str(model), "--method", "learned", "--format", name]
        assert main(asked) == 0
        made = model.with_name(f"model_learned_{name}.safetensors")
        assert main(["-q", "verify", str(made)]) == 0
        assert main(["-q", "compare", str(model), str(made)]) == 0
        source, file = FileSource(model), FileSource(made)
        assert json.loads(file.metadata["hswq"])["method"] == "learned"
        plan = Plan.from_json(file.metadata["hswq_plan"])
        learned = [layer for layer in plan.layers if layer.reason == LEARNED_CODES]
        assert len(learned) >= 2
        suffix = {"v1": None, "v2": "scale", "comfy": "weight_scale"}[name]
        for layer in learned:
            stem = f"{PREFIX}{layer.name}."
            scale = file.read(stem + suffix).reshape(()) if layer.scaled else None
            w, codes = source.read(stem + "weight"), file.read(stem + "weight")
            assert layer.numbers["loss"] == pytest.approx(quantized_loss(w, codes, scale), rel=1e-4)
            assert layer.numbers["loss"] < quantized_loss(w, nearest_codes(w, scale), scale)
        biases = [key for key in source.entries if key.endswith(".bias")]
        assert len(biases) == 5
        assert all(torch.equal(file.read(key), source.read(key)) for key in biases)
        assert not [path for path in model.parent.iterdir() if path.name.startswith(".hswq")]

    def test_again_gives_the_same_file_and_the_report_says_what_was_gained(self, model, capsys):
        assert main(["convert", str(model), "--method", "learned", "--format", "v2"]) == 0
        assert "learned rounding: quantized loss" in capsys.readouterr().err
        assert (
            main(["-q", "convert", str(model), "--method", "learned", "--format", "v2", "-o", str(model.parent / "b")])
            == 0
        )
        one = load_file(model.with_name("model_learned_v2.safetensors"))
        two = load_file(model.parent / "b" / "model_learned_v2.safetensors")
        assert all(torch.equal(one[key].float(), two[key].float()) for key in one)

    def test_a_setting_out_of_range_leaves_nothing(self, model, capsys):
        before = set(model.parent.iterdir())
        assert main(["-q", "convert", str(model), "--method", "learned", "--samples", "0"]) == 1
        assert "samples: got 0" in capsys.readouterr().err
        assert set(model.parent.iterdir()) == before
