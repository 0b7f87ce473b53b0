"""What a file says about itself, believed only as far as this release understands it."""

from __future__ import annotations

import json

import pytest
from hswq.hswq_core.convert.header import HEADER_KEY, PLAN_KEY, declared_format, declared_plan
from hswq.hswq_core.errors import FileError
from hswq.hswq_core.plan.formats import FORMATS
from hswq.hswq_core.plan.plan import KEEP, PLAN_VERSION, QUANTIZE, LayerPlan, Plan


@pytest.mark.parametrize("metadata", [None, {}, {"modelspec.title": "x"}])
def test_files_of_others_declare_nothing(metadata):
    assert declared_format(metadata, "x.safetensors") is None


@pytest.mark.parametrize("name", FORMATS)
def test_the_declared_format(name):
    assert declared_format({"hswq": json.dumps({"version": 1, "format": name})}, "x.safetensors") == name


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "{}", '{"version": 1}', '{"format": "v2"}', "null"])
def test_a_damaged_entry_is_named(text):
    with pytest.raises(FileError, match=r"File x\.safetensors, header entry hswq: got unreadable.*convert or download"):
        declared_format({"hswq": text}, "x.safetensors")


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"version": 2, "format": "v2"}, "version 2, expected version 1"),
        ({"version": "1", "format": "v2"}, "version '1'"),
        ({"version": 1, "format": "v9"}, "format 'v9'"),
    ],
)
def test_a_newer_version_or_format_asks_for_an_update(record, words):
    with pytest.raises(FileError, match=rf"{words}.*Update this node pack"):
        declared_format({"hswq": json.dumps(record)}, "x.safetensors")


PLAN = Plan("v2", "hswq", "0.25", "SDXL", (LayerPlan("a", "Linear", (4, 8), QUANTIZE, "clip search", "fp8", 0.5),))
BAD_PLAN = PLAN.to_json().replace('"quantize"', '"burn"')


def header(**more: object) -> str:
    return json.dumps({"version": 1, "format": "v2", **more})


def test_a_file_without_a_plan_declares_none():
    assert declared_plan({}, "x.safetensors") is None
    assert declared_plan({HEADER_KEY: header()}, "x.safetensors") is None


@pytest.mark.parametrize("said", [{}, {"plan": 1}, {"plan": PLAN_VERSION}, {"plan": PLAN_VERSION + 1}])
def test_the_declared_plan_of_any_release(said):
    later = json.loads(PLAN.to_json())
    later["layers"][0]["later"] = later["later"] = "something"
    for text in (PLAN.to_json(), json.dumps(later)):
        assert declared_plan({HEADER_KEY: header(**said), PLAN_KEY: text}, "x.safetensors") == PLAN
    assert declared_plan({PLAN_KEY: PLAN.to_json()}, "x.safetensors") == PLAN


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null", BAD_PLAN, PLAN.to_json().replace("0.5", "-0.5")])
@pytest.mark.parametrize("said", [None, {}, {"plan": 1}, {"plan": 2}, {"plan": "3"}, {"plan": True}, {"plan": None}])
def test_a_damaged_plan_is_named(text, said):
    metadata = {PLAN_KEY: text} if said is None else {HEADER_KEY: header(**said), PLAN_KEY: text}
    with pytest.raises(FileError, match=r"File x\.safetensors, plan: got unreadable.*convert or download"):
        declared_plan(metadata, "x.safetensors")


@pytest.mark.parametrize("text", ["{}", BAD_PLAN])
def test_a_plan_of_a_later_version_that_cannot_be_read_asks_for_an_update(text):
    metadata = {HEADER_KEY: header(plan=PLAN_VERSION + 1), PLAN_KEY: text}
    with pytest.raises(FileError, match=rf"File x\.safetensors, plan.*plan version {PLAN_VERSION + 1}: update"):
        declared_plan(metadata, "x.safetensors")


@pytest.mark.parametrize("entry", ["", "{", "[]", "{}", "null"])
def test_a_damaged_plan_beside_a_damaged_entry_names_the_file(entry):
    with pytest.raises(FileError, match=r"File x\.safetensors"):
        declared_plan({HEADER_KEY: entry, PLAN_KEY: BAD_PLAN}, "x.safetensors")


def test_a_plan_with_a_layer_twice_is_named():
    twice = Plan("v2", "hswq", "0.25", "SDXL", (LayerPlan("a", "Linear", (4, 8), KEEP, "why"),) * 2)
    with pytest.raises(FileError, match=r"File x\.safetensors, plan"):
        declared_plan({PLAN_KEY: twice.to_json()}, "x.safetensors")
