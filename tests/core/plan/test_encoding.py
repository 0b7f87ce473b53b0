from __future__ import annotations

import json
import math

import pytest
import torch
from hswq.hswq_core.errors import SettingError
from hswq.hswq_core.plan.encoding import Encoding
from hswq.hswq_core.plan.formats import FORMATS, comfy_marker, format_named
from hswq.hswq_core.quant.schemes.table import SCHEMES

FP8 = SCHEMES["fp8"]


def scale(encoding: Encoding, w: torch.Tensor, kind: str) -> torch.Tensor | None:
    return encoding.scheme(kind).nearest_tensors(w).get("weight_scale")


def test_a_scale_serves_a_layer_or_a_channel_or_there_is_none():
    w = torch.tensor([[1.0, -448.0], [896.0, 0.0]])
    assert scale(Encoding(format_named("v1")), w, "Linear") is None
    assert scale(Encoding(format_named("comfy")), w[:, :, None, None], "Conv2d") is None
    assert scale(Encoding(format_named("comfy")), w, "Linear").tolist() == 2.0
    each = Encoding(format_named("v2"), granularity="channel")
    assert scale(each, w, "Linear").tolist() == [[1.0], [2.0]]
    assert scale(each, w[:, :, None, None], "Conv2d").shape == (2, 1, 1, 1)
    assert scale(each, torch.zeros(2, 2), "Linear").tolist() == [[1.0], [1.0]]
    for encoding, kind in ((Encoding(format_named("comfy")), "Linear"), (each, "Linear"), (each, "Conv2d")):
        weight = w if kind == "Linear" else w[:, :, None, None]
        assert torch.equal(encoding.scheme(kind).steps(weight).unit, scale(encoding, weight, kind))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("kind", ["Linear", "Conv2d"])
def test_without_options_layers_are_stored_as_usual(name, kind):
    row = format_named(name)
    assert Encoding(row).scheme(kind) is Encoding(row).usual(kind) is row.usual(kind)
    each = Encoding(format_named("v2"), granularity="channel")
    assert (each.scheme(kind), each.usual(kind)) == (SCHEMES["fp8_channel"], FP8)


@pytest.mark.parametrize("name", [name for name, row in FORMATS.items() if name != "v2"])
def test_a_scale_a_channel_is_for_v2(name):
    with pytest.raises(SettingError, match=f"scale_per: got channel with format {name}, expected format v2"):
        Encoding(format_named(name), granularity="channel")
    with pytest.raises(SettingError, match="expected tensor or channel"):
        Encoding(format_named(name), granularity="row")


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "comfy"])
def test_fast_matmul_is_for_comfy(name):
    with pytest.raises(SettingError, match=f"fast_matmul: got 3 dB with format {name}, expected format comfy"):
        Encoding(format_named(name), fast_matmul=3.0)


@pytest.mark.parametrize("loss", [-1.0, 101.0, math.nan])
def test_a_loss_out_of_range(loss):
    with pytest.raises(SettingError, match=r"fast_matmul: got .*, expected 0 to 100 dB"):
        Encoding(format_named("comfy"), fast_matmul=loss)


def test_work_is_shared_by_what_rounds_alike():
    comfy = format_named("comfy")
    assert Encoding(comfy).text == Encoding(comfy, fast_matmul=3.0).text
    texts = {Encoding(row).text for row in FORMATS.values()} | {Encoding(FORMATS["v2"], granularity="channel").text}
    assert len(texts) == 4


@pytest.mark.parametrize("full", [True, False])
def test_the_marker_is_json_that_leaves_tensors_behind_it_aligned(full):
    marker = comfy_marker(FP8.marker(full_precision=full))
    assert len(marker) % 4 == 0
    read = json.loads(bytes(marker.tolist()))
    assert read == {"format": "float8_e4m3fn", "full_precision_matrix_mult": full}


def test_a_comfy_layer_with_an_input_scale_multiplies_in_8_bits():
    spelled, tensors = format_named("comfy").spelled, FP8.nearest_tensors(torch.ones(2, 2))
    slow, fast = (spelled(FP8, tensors, scale) for scale in (None, torch.tensor(0.25)))
    assert set(slow) == {"weight", "weight_scale", "comfy_quant"}
    assert set(fast) == {"weight", "weight_scale", "input_scale", "comfy_quant"}
    assert (fast["input_scale"].shape, fast["input_scale"].item()) == ((), 0.25)
    assert json.loads(bytes(fast["comfy_quant"].tolist()))["full_precision_matrix_mult"] is False
    assert json.loads(bytes(slow["comfy_quant"].tolist()))["full_precision_matrix_mult"] is True
    cast = SCHEMES["fp8_cast"]
    assert set(spelled(cast, cast.nearest_tensors(torch.ones(2, 2)), torch.tensor(0.25))) == {"weight"}
