from __future__ import annotations

import json
import math

import pytest
import torch
from hswq.hswq_core.errors import SettingError
from hswq.hswq_core.plan.formats import (
    FORMATS,
    SCALE_SUFFIXES,
    UNSCALED_CONV_MAX_LOSS_DB,
    comfy_marker,
    format_named,
)
from hswq.hswq_core.quant.schemes.fp8 import Fp8
from hswq.hswq_core.quant.schemes.scheme import CHANNEL, TENSOR, Scheme
from hswq.hswq_core.quant.schemes.table import SCHEMES, scheme_named

FP8, CAST = SCHEMES["fp8"], SCHEMES["fp8_cast"]
SCALED = {name: row for name, row in SCHEMES.items() if row.scaled}


def spelled(name: str, scheme: Scheme) -> dict[str, torch.Tensor]:
    """Beside the weight, of one whose scale is 0.5."""
    tensors = scheme.nearest_tensors(torch.full((3, 2), 224.0))
    found = dict(format_named(name).spelled(scheme, tensors, None))
    assert found.pop("weight") is tensors["weight"]
    return found


def test_the_three_formats_with_the_default_first():
    assert list(FORMATS) == ["comfy", "v2", "v1"]
    assert [format_named(name).name for name in FORMATS] == list(FORMATS)


@pytest.mark.parametrize("name", ["", "V2", "scaled", "../v1"])
def test_another_name_is_an_error_that_lists_them(name):
    with pytest.raises(SettingError, match="comfy or v2 or v1"):
        format_named(name)


@pytest.mark.parametrize(("name", "linear", "conv"), [("v1", False, False), ("v2", True, True), ("comfy", True, False)])
def test_which_kinds_have_a_scale(name, linear, conv):
    """ComfyUI has no scaled convolution: it would ignore the scale and paint noise."""
    row = format_named(name)
    assert [row.usual(kind).scaled for kind in ("Linear", "Conv2d")] == [linear, conv]
    assert row.scaled_kinds() == {kind for kind, has in (("Linear", linear), ("Conv2d", conv)) if has}
    stored = {scheme_named(scheme).scaled for names in row.schemes.values() for scheme in names}
    assert row.all_scaled == (linear and conv) == (stored == {True})


@pytest.mark.parametrize("kind", ["Linear", "Conv2d"])
def test_scales_of_channels_are_v2s_alone_and_unscaled_layers_have_no_granularity(kind):
    found = {name: row.scheme(kind, CHANNEL) for name, row in FORMATS.items()}
    assert found == {"comfy": CAST if kind == "Conv2d" else None, "v2": SCHEMES["fp8_channel"], "v1": CAST}
    assert all(row.scheme(kind, TENSOR) is row.usual(kind) for row in FORMATS.values())


def test_only_comfy_may_keep_what_it_cannot_scale():
    limits = {name: row.max_loss_db for name, row in FORMATS.items()}
    assert limits == {"comfy": UNSCALED_CONV_MAX_LOSS_DB, "v2": math.inf, "v1": math.inf}
    judged = {kind: row.usual(kind).judged_against for row in [FORMATS["comfy"]] for kind in ("Linear", "Conv2d")}
    assert judged == {"Linear": "", "Conv2d": "fp8"}


@pytest.mark.parametrize("name", ["comfy", "v1"])
def test_an_unscaled_layer_has_no_extra_tensor(name):
    assert spelled(name, CAST) == {}


def test_v1_has_codes_alone():
    assert spelled("v1", FP8) == {}


def test_v2_stores_its_scale_as_one_float32_in_a_vector():
    ((key, scale),) = spelled("v2", FP8).items()
    assert (key, scale.dtype, scale.tolist()) == ("scale", torch.float32, [0.5])


def test_v2_stores_scales_of_channels_in_a_vector_too():
    ((key, scale),) = spelled("v2", SCHEMES["fp8_channel"]).items()
    assert (key, scale.dtype, scale.tolist()) == ("scale", torch.float32, [0.5] * 3)


def test_every_scale_is_spelled_in_a_way_that_readers_know():
    for name, row in FORMATS.items():
        for scheme in {row.usual(kind).name for kind in row.scaled_kinds()}:
            assert len(set(spelled(name, SCHEMES[scheme])) & set(SCALE_SUFFIXES)) == 1


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("name", FORMATS)
def test_tensors_without_data_are_spelled_as_those_with_it(name, fast):
    """The header of a file is written before its weights are rounded."""
    row = format_named(name)
    for scheme in {scheme for names in row.schemes.values() for scheme in names}:
        own = SCHEMES[scheme]
        inputs = torch.tensor(0.25) if fast else None
        found = row.spelled(own, own.nearest_tensors(torch.randn(5, 4)), inputs)
        described = row.spelled(own, own.described((5, 4)), inputs)
        assert list(described) == list(found)
        assert next(iter(found)) == "weight"
        for key, tensor in found.items():
            assert (described[key].dtype, described[key].shape) == (tensor.dtype, tensor.shape)


def test_comfy_stores_a_scalar_scale_and_a_marker():
    extra = spelled("comfy", FP8)
    assert list(extra) == ["weight_scale", "comfy_quant"]
    assert (extra["weight_scale"].dtype, tuple(extra["weight_scale"].shape)) == (torch.float32, ())
    assert extra["weight_scale"].item() == 0.5


def test_the_comfy_marker_is_json_in_bytes():
    marker = comfy_marker(FP8.marker(full_precision=True))
    assert (marker.dtype, marker.dim()) == (torch.uint8, 1)
    assert json.loads(bytes(marker.tolist())) == {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}


@pytest.mark.parametrize("scheme", SCALED.values(), ids=SCALED)
def test_the_comfy_marker_keeps_what_follows_aligned(scheme):
    """Tensors lie back to back in a file: after a marker of 63 bytes, float16 weights would start at odd ones."""
    assert len(comfy_marker(scheme.marker(full_precision=True))) % 4 == 0


@pytest.mark.parametrize(
    ("name", "schemes", "release"),
    [
        ("comfy", ("fp8", "fp8_cast"), "0.18.2"),
        ("v1", ("fp8_cast",), "0.18.2"),
        ("v2", ("fp8",), ""),  # HSWQ Loader's
        ("comfy", ("fp8", "fp8_channel"), ""),
        ("comfy", ("of a later release",), ""),
    ],
)
def test_the_oldest_comfyui_that_opens_a_file(name, schemes, release):
    assert format_named(name).stock_since(schemes) == release


def test_the_newest_scheme_decides_which_comfyui_is_old_enough(monkeypatch):
    class Newer(Fp8):
        name = "newer"
        stock_since = "0.27.0"

    monkeypatch.setitem(SCHEMES, "newer", Newer())
    assert format_named("comfy").stock_since(("fp8", "newer")) == "0.27.0"
