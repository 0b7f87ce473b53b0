from __future__ import annotations

import dataclasses
import json
import math

import pytest
from hswq.hswq_core.errors import LayerError
from hswq.hswq_core.plan.plan import KEEP, QUANTIZE, SKIP, LayerPlan, Plan
from hswq.hswq_core.progress import Step, no_progress, time_left

LAYERS = (
    LayerPlan("a", "Linear", (4, 8), QUANTIZE, "clip search", "fp8", 0.09375).measured(sensitivity=0.125, sqnr_db=31.5),
    LayerPlan("b", "Conv2d", (4, 8, 3, 3), QUANTIZE, "clip search", "fp8_cast", 1 / 3).measured(sensitivity=1e-12),
    LayerPlan("c", "Linear", (8, 8), KEEP, "high sensitivity").measured(sensitivity=7.0),
    LayerPlan("d", "Linear", (2, 2), SKIP, "tiny"),
    LayerPlan("e", "Linear", (2, 2), SKIP, "tiny"),
    LayerPlan("f", "Linear", (64, 64), SKIP, "not used"),
)
PLAN = Plan("v2", "hswq", "0.25", "SDXL", LAYERS)


def test_json_round_trip_is_exact():
    again = Plan.from_json(PLAN.to_json())
    assert again == PLAN
    assert again.layers[1].amax == 1 / 3
    assert isinstance(again.layers[0].shape, tuple)


def test_json_is_plain_json():
    data = json.loads(PLAN.to_json())
    assert data["layers"][0]["shape"] == [4, 8]
    assert data["layers"][1]["sqnr_db"] is None


def test_json_says_what_release_0_2_wants():
    """Of a plan, and of each of its layers: that release refuses files that lack any."""
    data = json.loads(PLAN.to_json())
    assert set(data) == {"file_format", "method", "budget", "family", "grid", "granularity", "layers"}
    for record in data["layers"]:
        assert set(record) == set(RECORD_0_2) | {"scheme"}
    assert (data["grid"], data["granularity"]) == ("float8_e4m3fn", "tensor")
    assert [record["scaled"] for record in data["layers"]] == [True] + [False] * 5


# A quantized layer as release 0.2 wrote it.
RECORD_0_2 = {
    "name": "a",
    "kind": "Linear",
    "shape": [4, 8],
    "action": "quantize",
    "reason": "clip search",
    "scaled": True,
    "amax": 0.09375,
    "sensitivity": 0.125,
    "sqnr_db": 31.5,
    "change": None,
    "damping": 0.0,
    "dead": 0,
    "input_amax": 0.0,
    "loss": None,
    "nearest_loss": None,
}
PLAN_0_2 = {"file_format": "v2", "method": "hswq", "budget": "0.25", "family": "SDXL", "grid": "float8_e4m3fn"}


def read(*records: dict, **common: object) -> Plan:
    return Plan.from_json(json.dumps({**PLAN_0_2, **common, "layers": records}))


@pytest.mark.parametrize("common", [{}, {"granularity": "tensor"}])
def test_a_plan_of_an_earlier_release_is_read(common):
    """Without a granularity: of release 0.1."""
    assert read(RECORD_0_2, **common) == dataclasses.replace(PLAN, layers=LAYERS[:1])


@pytest.mark.parametrize(
    ("changed", "granularity", "scheme"),
    [
        ({}, "tensor", "fp8"),
        ({}, "channel", "fp8_channel"),
        ({"scaled": False}, "tensor", "fp8_cast"),
        ({"scaled": False}, "channel", "fp8_cast"),
        ({"action": "keep", "scaled": False}, "tensor", ""),
        ({"action": "skip", "scaled": False}, "channel", ""),
    ],
)
def test_the_scheme_of_a_layer_of_an_earlier_release(changed, granularity, scheme):
    plan = read({**RECORD_0_2, **changed}, granularity=granularity)
    assert plan.layers[0].scheme == scheme
    assert plan.layers[0].scaled == (scheme in ("fp8", "fp8_channel"))
    assert plan.granularity == ("channel" if scheme == "fp8_channel" else "tensor")
    assert plan.grid == "float8_e4m3fn"


def without(field: str) -> str:
    data = json.loads(PLAN.to_json())
    del data["layers"][2][field]
    return json.dumps(data)


def test_what_a_record_does_not_say_is_filled_in():
    again = Plan.from_json(without("amax"))
    assert again == PLAN
    assert again.layers[2].amax == 0.0
    for field in ("reason", "scheme", "scaled", "input_amax", "sensitivity", "sqnr_db", "change", "damping", "dead"):
        Plan.from_json(without(field))
    (least,) = read({"name": "a", "kind": "Linear", "shape": [4, 8], "action": "keep"}).layers
    assert least == LayerPlan("a", "Linear", (4, 8), KEEP, "")
    assert Plan.from_json('{"layers":[]}') == Plan("", "", "", "", ())


@pytest.mark.parametrize("value", [None, "text", True, {"a": [1]}, [2], 0.5, 3, 0, -0.5, -3])
def test_what_a_later_release_says_beside_it_is_taken(value):
    """Numbers are kept for those who know what they are, the rest is left out."""
    (layer,) = read({**RECORD_0_2, "later": value}, later=value).layers
    expected = {"later": value} if type(value) in (int, float) else {}
    assert layer == LAYERS[0].measured(**expected)
    assert json.loads(dataclasses.replace(PLAN, layers=(layer,)).to_json())["layers"][0].get("later") == (
        expected.get("later")
    )
    assert Plan.from_json(PLAN.to_json().replace('"method"', '"unknown"')) == dataclasses.replace(PLAN, method="")


def test_a_scheme_of_a_later_release_is_taken_and_not_known():
    plan = read({**RECORD_0_2, "scheme": "int3"})
    assert (plan.layers[0].scheme, plan.layers[0].stored, plan.layers[0].scaled) == ("int3", None, False)
    assert Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "null",
        "1",
        '"text"',
        "[]",
        "{}",
        '{"layers":5}',
        '{"layers":[1]}',
        without("name"),
        without("kind"),
        without("shape"),
        without("action"),
        PLAN.to_json().replace('"layers"', '"unknown"'),
    ],
)
def test_anything_else_is_refused(text):
    with pytest.raises((KeyError, TypeError, ValueError)):
        Plan.from_json(text)


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": 3},
        {"name": ""},
        {"kind": None},
        {"shape": 4},
        {"shape": [-1]},
        {"shape": [1.5]},
        {"action": "burn"},
        {"reason": 3},
        {"scheme": 3},
        {"scaled": "yes"},
        {"amax": "much"},
        {"amax": None},
        {"input_amax": True},
        {"sensitivity": "much"},
        {"sqnr_db": []},
        {"change": {}},
        {"loss": True},
        {"dead": -1},
    ],
    ids=str,
)
def test_a_layer_that_says_something_of_another_type_is_refused(wrong):
    with pytest.raises(ValueError, match=r"\w"):
        read({**RECORD_0_2, **wrong})


@pytest.mark.parametrize("name", ["file_format", "method", "budget", "family", "granularity"])
def test_a_plan_that_says_something_of_another_type_is_refused(name):
    with pytest.raises(ValueError, match=r"\w"):
        read(RECORD_0_2, **{name: 3})


# Numbers that were measured


def test_what_was_not_measured_is_no_number_of_a_layer():
    (plain,) = read({**RECORD_0_2, "sensitivity": 0.0, "sqnr_db": None}).layers
    assert plain.numbers == {}
    assert plain.measured(sensitivity=0.0, sqnr_db=None, change=None, damping=0.0, dead=0, loss=None) == plain
    assert (plain.sensitivity, plain.sqnr_db, plain.change) == (0.0, None, None)
    assert plain.measured(change=0.0).change == 0.0  # measured, and nothing changed


def test_numbers_add_up_and_stand_in_the_json():
    layer = LAYERS[0].measured(change=0.5, dead=3).measured(loss=0.25, nearest_loss=math.inf, change=0.75)
    assert (layer.sensitivity, layer.sqnr_db, layer.change) == (0.125, 31.5, 0.75)
    assert {name: layer.numbers.get(name) for name in ("dead", "loss", "nearest_loss", "damping")} == {
        "dead": 3,
        "loss": 0.25,
        "nearest_loss": math.inf,
        "damping": None,
    }
    plan = dataclasses.replace(PLAN, layers=(layer,))
    assert Plan.from_json(plan.to_json()) == plan
    record = layer.to_record()
    assert (record["change"], record["dead"], record["loss"], record["damping"]) == (0.75, 3, 0.25, 0.0)
    assert LAYERS[0].numbers == {"sensitivity": 0.125, "sqnr_db": 31.5}


def test_grid_and_granularity_follow_from_the_schemes():
    channel = dataclasses.replace(LAYERS[0], scheme="fp8_channel")
    assert (PLAN.grid, PLAN.granularity) == ("float8_e4m3fn", "tensor")
    mixed = dataclasses.replace(PLAN, layers=(*LAYERS[1:], channel))
    assert (mixed.grid, mixed.granularity) == ("float8_e4m3fn", "channel")
    nothing = dataclasses.replace(PLAN, layers=())
    assert (nothing.grid, nothing.granularity) == ("float8_e4m3fn", "tensor")


def test_counts_name_all_three_actions():
    assert PLAN.counts() == {QUANTIZE: 2, KEEP: 1, SKIP: 3}
    assert dataclasses.replace(PLAN, layers=()).counts() == {QUANTIZE: 0, KEEP: 0, SKIP: 0}


def test_reasons_are_counted_per_action():
    assert PLAN.by_reason(SKIP) == {"tiny": 2, "not used": 1}
    assert PLAN.by_reason(KEEP) == {"high sensitivity": 1}


def test_accounting_is_one_line_that_adds_up():
    assert PLAN.accounting() == "2 quantized + 1 kept + 3 skipped (not used: 1, tiny: 2) = 6 layers"


def test_accounting_of_a_plan_that_skips_nothing():
    plan = dataclasses.replace(PLAN, layers=LAYERS[:3])
    assert plan.accounting() == "2 quantized + 1 kept + 0 skipped = 3 layers"


def test_a_closed_plan_passes():
    PLAN.require_closed(6)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (LAYERS[:5], 6),
        (LAYERS, 5),
        ((*LAYERS[:5], LAYERS[0]), 6),
        ((*LAYERS, LAYERS[0]), 6),
        ((*LAYERS[:5], dataclasses.replace(LAYERS[5], action="perhaps")), 6),
    ],
    ids=["one missing", "one too many", "one twice and one missing", "one twice", "one undecided"],
)
def test_accounting_that_does_not_close_is_an_error(layers, expected):
    with pytest.raises(LayerError, match="quantized"):
        dataclasses.replace(PLAN, layers=layers).require_closed(expected)


def test_plans_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PLAN.layers[0].amax = 1.0


def test_weights_of_a_layer():
    assert [layer.weights for layer in LAYERS[:2]] == [32, 288]


def test_no_progress_accepts_what_progress_is_called_with():
    assert no_progress(Step("Searching", "a layer"), 1, 2) is None


@pytest.mark.parametrize(
    ("seconds", "done", "total", "text"),
    [
        (60.0, 1, 4, ", 3 min left"),
        (60.0, 3, 4, ", 20 s left"),
        (30.0, 10**9, 3 * 10**9, ", 1 min left"),
        (1.0, 1, 4, ""),
        (60.0, 0, 4, ""),
        (60.0, 4, 4, ""),
        (60.0, 0, 0, ""),
    ],
)
def test_the_time_that_is_left(seconds, done, total, text):
    assert time_left(seconds, done, total) == text
