from __future__ import annotations

import dataclasses
import json

import pytest
from hswq.hswq_core.errors import LayerError
from hswq.hswq_core.plan.plan import KEEP, QUANTIZE, SKIP, LayerPlan, Plan
from hswq.hswq_core.progress import no_progress, time_left

LAYERS = (
    LayerPlan("a", "Linear", (4, 8), QUANTIZE, "clip search", True, 0.09375, 0.125, 31.5),
    LayerPlan("b", "Conv2d", (4, 8, 3, 3), QUANTIZE, "clip search", False, 1 / 3, 1e-12, None),
    LayerPlan("c", "Linear", (8, 8), KEEP, "high sensitivity", sensitivity=7.0),
    LayerPlan("d", "Linear", (2, 2), SKIP, "tiny"),
    LayerPlan("e", "Linear", (2, 2), SKIP, "tiny"),
    LayerPlan("f", "Linear", (64, 64), SKIP, "not used"),
)
PLAN = Plan("v2", "hswq", "0.25", "SDXL", "float8_e4m3fn", LAYERS)


def test_json_round_trip_is_exact():
    again = Plan.from_json(PLAN.to_json())
    assert again == PLAN
    assert again.layers[1].amax == 1 / 3
    assert isinstance(again.layers[0].shape, tuple)


def test_json_is_plain_json():
    data = json.loads(PLAN.to_json())
    assert data["layers"][0]["shape"] == [4, 8]
    assert data["layers"][1]["sqnr_db"] is None


def without(field: str) -> str:
    data = json.loads(PLAN.to_json())
    del data["layers"][2][field]
    return json.dumps(data)


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
        '{"layers":[]}',
        without("amax"),
        without("name"),
        PLAN.to_json().replace('"method"', '"unknown"'),
    ],
)
def test_anything_else_is_refused(text):
    with pytest.raises((KeyError, TypeError, ValueError)):
        Plan.from_json(text)


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
    assert no_progress("Searching", 1, 2) is None


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
