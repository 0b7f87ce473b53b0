from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hswq.hswq_core.calibration.observer import LayerStats
from hswq.hswq_core.calibration.session import Session
from hswq.hswq_core.errors import LayerError, SettingError
from hswq.hswq_core.methods.exclusions import NEVER_CALLED, TINY_WEIGHTS, Exclusions
from hswq.hswq_core.methods.hswq import HSWQSettings, keep_by_sensitivity, plan_hswq
from hswq.hswq_core.methods.method import Task
from hswq.hswq_core.methods.solutions import Solutions
from hswq.hswq_core.model.families import FAMILIES, GENERIC, Family
from hswq.hswq_core.model.layer import Layer
from hswq.hswq_core.plan.encoding import Encoding
from hswq.hswq_core.plan.formats import UNSCALED_CONV_MAX_LOSS_DB, format_named
from hswq.hswq_core.plan.plan import KEEP, QUANTIZE, SKIP, Plan
from hswq.hswq_core.progress import Step
from hswq.hswq_core.quant.clip_search import search_amax
from hswq.hswq_core.quant.schemes.table import SCHEMES

LINEAR, CONV = (160, 128), (64, 32, 3, 3)  # 20,480 and 18,432 weights: just above tiny


class Toy:
    """A model of named weights with statistics, planned by ``plan``."""

    def __init__(self, session_of: Callable[..., Session], stats_of: Callable[..., LayerStats]) -> None:
        self._session_of, self._stats_of = session_of, stats_of
        self.weights: dict[str, torch.Tensor] = {}
        self.stats: dict[str, LayerStats] = {}
        self.read: list[str] = []

    def add(self, name: str, weight: torch.Tensor | None = None, **stats: float) -> None:
        weight = torch.randn(LINEAR) * 0.02 if weight is None else weight
        self.weights[name] = weight
        self.stats[name] = self._stats_of("Linear" if weight.dim() == 2 else "Conv2d", tuple(weight.shape), **stats)

    def layers(self) -> list[Layer]:
        return [Layer(name, self.stats[name].kind, tuple(w.shape), w.dtype) for name, w in self.weights.items()]

    def session(self) -> Session:
        return self._session_of(self.weights, self.stats)

    def plan(
        self,
        file_format: str = "v2",
        keep_ratio: float = 0.0,
        family: Family = GENERIC,
        session: Session | None = None,
        exclusions: Exclusions | None = None,
        **rest: Callable[..., None],
    ) -> Plan:
        def read(layer: Layer) -> torch.Tensor:
            self.read.append(layer.name)
            return self.weights[layer.name]

        task = Task(
            layers=self.layers(),
            read=read,
            exclusions=exclusions or Exclusions(family),
            encoding=Encoding(format_named(file_format)),
            solutions=Solutions(Path(os.devnull)),  # takes none
            session=session or self.session(),
            **rest,
        )
        found = plan_hswq(task, HSWQSettings(keep_ratio))
        assert (dict(found.solutions), found.notes) == ({}, ())
        return found.plan


@pytest.fixture
def toy(session_of, stats_of) -> Toy:
    return Toy(session_of, stats_of)


@pytest.fixture
def ten(toy) -> Toy:
    """Ten Linears, l0 to l9, of sensitivity 0 to 9."""
    for i in range(10):
        toy.add(f"l{i}", sensitivity=float(i))
    return toy


def actions(plan: Plan) -> dict[str, str]:
    return {layer.name: layer.action for layer in plan.layers}


def kept(plan: Plan) -> list[str]:
    return [layer.name for layer in plan.layers if layer.action == KEEP]


# Which layers are kept


@pytest.mark.parametrize(
    ("ratio", "count"), [(0.0, 0), (0.09, 0), (0.1, 1), (0.25, 2), (0.29, 2), (0.99, 9), (1.0, 10)]
)
def test_int_of_n_times_ratio_layers_of_largest_sensitivity_are_kept(ten, ratio, count):
    plan = ten.plan(keep_ratio=ratio)
    assert kept(plan) == [f"l{i}" for i in range(10 - count, 10)]
    assert plan.counts() == {QUANTIZE: 10 - count, KEEP: count, SKIP: 0}


def test_a_kept_layer_says_why_and_is_not_read(ten):
    plan = ten.plan(keep_ratio=0.5)
    assert {layer.reason for layer in plan.layers if layer.action == KEEP} == {"high sensitivity"}
    assert sorted(ten.read) == ["l0", "l1", "l2", "l3", "l4"]


def test_every_layer_is_in_the_plan_once_in_model_order_with_its_sensitivity(ten):
    plan = ten.plan(keep_ratio=0.3)
    assert [layer.name for layer in plan.layers] == [f"l{i}" for i in range(10)]
    assert [layer.sensitivity for layer in plan.layers] == [float(i) for i in range(10)]
    assert (plan.method, plan.budget, plan.file_format, plan.family) == ("hswq", "0.3", "v2", "generic")
    assert plan.grid == "float8_e4m3fn"


def test_equally_sensitive_layers_are_kept_in_order_of_name():
    assert keep_by_sensitivity({"c": 1.0, "b": 1.0, "a": 1.0, "d": 2.0}, 0.5) == {"d", "a"}
    assert keep_by_sensitivity({}, 1.0) == set()


def test_layers_that_are_never_quantized_do_not_use_up_the_ratio(ten):
    """Of 12 layers 10 are eligible, so 0.1 keeps one of those, though the tiny ones are the most sensitive."""
    ten.add("tiny1", torch.randn(8, 8), sensitivity=100.0)
    ten.add("tiny2", torch.randn(8, 8), sensitivity=101.0)
    assert kept(ten.plan(keep_ratio=0.1)) == ["l9"]


@pytest.mark.parametrize("ratio", [-0.01, 1.01, math.nan, math.inf, -math.inf])
def test_a_ratio_out_of_range_is_an_error_before_any_work(ten, ratio):
    with pytest.raises(SettingError, match="keep_ratio"):
        ten.plan(keep_ratio=ratio)
    assert ten.read == []


@pytest.mark.parametrize("ratio", [0.0, 0.25, 1.0])
def test_a_ratio_in_range_passes(ratio):
    assert HSWQSettings(ratio).keep_ratio == ratio
    assert HSWQSettings(ratio).text == f"{ratio:g}"


# Which layers are skipped


@pytest.mark.parametrize(
    ("shape", "action"),
    [((128, 128), SKIP), ((129, 128), QUANTIZE), ((64, 4, 8, 8), SKIP), ((65, 4, 8, 8), QUANTIZE), ((4, 4), SKIP)],
)
def test_layers_of_up_to_16_k_weights_are_skipped(toy, shape, action):
    assert TINY_WEIGHTS == 128 * 128 == 16_384
    toy.add("layer", torch.randn(shape) * 0.02)
    plan = toy.plan(keep_ratio=0.0)
    assert actions(plan) == {"layer": action}
    assert plan.counts()[action] == 1


def test_a_layer_that_was_never_called_is_skipped_and_says_so(ten):
    ten.add("unused", calls=0)
    plan = ten.plan(keep_ratio=1.0)
    assert actions(plan)["unused"] == SKIP
    assert plan.by_reason(SKIP) == {NEVER_CALLED: 1}
    assert plan.counts()[KEEP] == 10


def test_as_published_ranks_every_layer_it_has_seen(toy):
    toy.add("out.2", torch.randn(16, 32, 3, 3) * 0.05)  # tiny, and an end of the family
    toy.add("unused", calls=0)
    plan = toy.plan(exclusions=Exclusions.as_published(FAMILIES[0]))
    assert actions(plan) == {"out.2": QUANTIZE, "unused": SKIP}
    assert plan.family == "SDXL"


def test_the_ends_of_a_known_family_are_skipped_and_the_row_gives_the_reason(toy):
    sdxl = FAMILIES[0]
    toy.add("input_blocks.0.0", torch.randn(320, 64, 3, 3) * 0.05)
    toy.add("middle_block.1.proj_in", torch.randn(CONV) * 0.05)
    plan = toy.plan(family=sdxl)
    assert actions(plan) == {"input_blocks.0.0": SKIP, "middle_block.1.proj_in": QUANTIZE}
    assert plan.layers[0].reason == sdxl.never_reason("input_blocks.0.0")
    assert plan.family == "SDXL"
    assert actions(toy.plan())["input_blocks.0.0"] == QUANTIZE  # of no known family


# What a quantized layer's numbers are


@pytest.mark.parametrize("weight", [torch.randn(LINEAR) * 0.02, torch.randn(CONV) * 0.05], ids=["Linear", "Conv2d"])
@pytest.mark.parametrize("file_format", ["v1", "v2"])
def test_amax_is_the_searchs_answer_for_the_layers_own_importance(toy, weight, file_format):
    toy.add("layer", weight)
    importance = torch.linspace(0.5, 1.5, weight.shape[1], dtype=torch.float64).float()
    expected = search_amax(
        weight,
        importance.view(1, -1, *(1,) * (weight.dim() - 2)),
        SCHEMES["fp8" if file_format == "v2" else "fp8_cast"],
    )
    (layer,) = toy.plan(file_format).layers
    assert (layer.action, layer.amax, layer.scaled) == (QUANTIZE, expected.amax, file_format == "v2")


def test_sqnr_is_that_of_the_stored_weight(toy):
    toy.add("layer")
    (layer,) = toy.plan("v2").layers
    w = toy.weights["layer"].double()
    scale = torch.tensor(layer.amax, dtype=torch.float32) / 448
    stored = (w.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn).double() * scale.double()
    assert layer.sqnr_db == pytest.approx((10 * torch.log10((w**2).sum() / ((w - stored) ** 2).sum())).item(), abs=1e-4)


def test_a_weight_of_zeros_is_quantized_exactly(toy):
    """Zero-initialized output convolutions are common; JSON knows no infinity, so exact is None."""
    toy.add("layer", torch.zeros(LINEAR))
    for file_format in ("v1", "v2", "comfy"):
        plan = toy.plan(file_format)
        assert plan.layers[0].action == QUANTIZE
        assert (plan.layers[0].amax, plan.layers[0].sqnr_db) == (0.0, None)
        assert Plan.from_json(plan.to_json()) == plan


def test_importance_of_a_dead_layer_clips_nothing(toy):
    toy.add("layer")
    toy.stats["layer"].abs_sum = torch.zeros(LINEAR[1], dtype=torch.float64)
    (layer,) = toy.plan().layers
    assert layer.amax == toy.weights["layer"].abs().max().item()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_any_16_or_32_bit_weight_is_planned(toy, dtype):
    toy.add("layer", (torch.randn(LINEAR) * 0.02).to(dtype))
    (layer,) = toy.plan().layers
    assert layer.sqnr_db == pytest.approx(31.5, abs=0.5)


def test_a_grouped_convolution_is_planned_with_all_its_channels(toy):
    toy.add("layer", torch.randn(64, 32, 3, 3) * 0.05, channels=64)
    assert actions(toy.plan()) == {"layer": QUANTIZE}


def test_inputs_are_left_alone(ten):
    weights = {name: w.clone() for name, w in ten.weights.items()}
    session = ten.session()
    sums = {name: stats.abs_sum.clone() for name, stats in session.layers.items()}
    ten.plan(keep_ratio=0.5, session=session)
    assert all(torch.equal(w, weights[name]) for name, w in ten.weights.items())
    assert all(torch.equal(stats.abs_sum, sums[name]) for name, stats in session.layers.items())


def test_the_same_inputs_give_the_same_plan(ten):
    assert ten.plan(keep_ratio=0.3) == ten.plan(keep_ratio=0.3)


# ComfyUI's convolutions


def unscaled_loss_db(w: torch.Tensor) -> float:
    """What a plain cast loses against a scaled one, in dB."""
    scale = w.abs().max() / 448
    plain = w.to(torch.float8_e4m3fn).double()
    scaled = (w / scale).clamp(-448, 448).to(torch.float8_e4m3fn).double() * scale.double()
    return (10 * torch.log10(((w.double() - plain) ** 2).sum() / ((w.double() - scaled) ** 2).sum())).item()


@pytest.mark.parametrize(("sigma", "action"), [(0.05, QUANTIZE), (0.02, QUANTIZE), (0.01, KEEP), (0.001, KEEP)])
def test_a_comfy_convolution_is_cast_plainly_or_kept_by_what_that_costs(toy, sigma, action):
    toy.add("conv", torch.randn(CONV) * sigma)
    loss = unscaled_loss_db(toy.weights["conv"])
    assert (loss > UNSCALED_CONV_MAX_LOSS_DB) == (action == KEEP)
    (layer,) = toy.plan("comfy").layers
    assert (layer.action, layer.scaled) == (action, False)
    assert (f"{UNSCALED_CONV_MAX_LOSS_DB:g} dB" in layer.reason) == (action == KEEP)


def test_other_formats_quantize_that_convolution_and_comfy_that_linear(toy):
    toy.add("conv", torch.randn(CONV) * 0.001)
    toy.add("linear", torch.randn(LINEAR) * 0.001)
    assert actions(toy.plan("v1")) == actions(toy.plan("v2")) == {"conv": QUANTIZE, "linear": QUANTIZE}
    comfy = toy.plan("comfy")
    assert actions(comfy) == {"conv": KEEP, "linear": QUANTIZE}
    assert comfy.layers[1].scaled


def test_a_comfy_convolution_that_a_plain_cast_keeps_exactly_is_cast(toy):
    weight = torch.full(CONV, 0.5)
    weight[0] = -0.375
    toy.add("conv", weight)
    (layer,) = toy.plan("comfy").layers
    assert (layer.action, layer.sqnr_db) == (QUANTIZE, None)


def test_a_comfy_convolution_that_a_plain_cast_would_erase_is_kept(toy):
    """Half of the smallest code, 2⁻⁹, is cast to zero."""
    toy.add("conv", torch.full(CONV, 2.0**-10))
    assert actions(toy.plan("comfy")) == {"conv": KEEP}


# Errors


def test_without_a_session_there_is_an_error_that_says_what_needs_none(ten):
    task = Task(
        layers=ten.layers(),
        read=ten.weights.__getitem__,
        exclusions=Exclusions(GENERIC),
        encoding=Encoding(format_named("v2")),
        solutions=Solutions(Path(os.devnull)),
    )
    with pytest.raises(SettingError, match=r"session: got none.*method hswq.*learned or nearest"):
        plan_hswq(task, HSWQSettings())


def test_a_layer_without_statistics_is_an_error_that_names_it(ten):
    session = ten.session()
    del session.layers["l4"]
    with pytest.raises(LayerError, match=r"Layer l4.*none"):
        ten.plan(session=session)
    assert ten.read == []


def test_statistics_of_another_shape_are_an_error_that_names_the_layer(ten):
    session = ten.session()
    session.layers["l4"].shape = (128, 160)
    with pytest.raises(LayerError, match=r"Layer l4.*\(128, 160\).*\(160, 128\)"):
        ten.plan(session=session)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_layer_already_in_fp8_is_an_error_that_names_it(ten, dtype):
    ten.weights["l4"] = ten.weights["l4"].to(dtype)
    with pytest.raises(LayerError, match=r"Layer l4.*already FP8"):
        ten.plan("v2", keep_ratio=0.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_is_an_error_that_names_the_layer(ten, bad):
    ten.weights["l4"][3, 5] = bad
    with pytest.raises(LayerError, match=r"Layer l4.*NaN or infinity"):
        ten.plan(session=_session_of_finite(ten))


def _session_of_finite(toy: Toy) -> Session:
    finite = {name: torch.nan_to_num(w) for name, w in toy.weights.items()}
    return toy._session_of(finite, toy.stats)


def test_importance_of_another_length_is_an_error_that_names_the_layer(ten):
    ten.stats["l4"].abs_sum = torch.ones(LINEAR[1] * 2, dtype=torch.float64)
    with pytest.raises(LayerError, match=r"l4.*importance"):
        ten.plan()


# Progress


def test_progress_is_told_every_layer_in_bytes_and_may_cancel(ten):
    seen, size = [], 4 * math.prod(LINEAR)

    def cancel_at_4(step: Step, done: int, total: int) -> None:
        seen.append((step, done, total))
        if done == 4 * size:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ten.plan(progress=cancel_at_4)
    assert seen == [(Step("Searching", f"l{i}"), i * size, 10 * size) for i in range(5)]
    assert ten.read == ["l0", "l1", "l2", "l3"]


def test_an_empty_model_has_an_empty_plan(toy, session_of, stats_of):
    session = session_of({"x": torch.ones(2, 2)}, {"x": stats_of("Linear", (2, 2))})
    assert toy.plan(session=session).layers == ()
