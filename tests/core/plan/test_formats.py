from __future__ import annotations

import json

import pytest
import torch
from hswq.hswq_core.errors import SettingError
from hswq.hswq_core.plan.formats import FORMATS, comfy_marker, format_named
from hswq.hswq_core.quant.grid import FLOAT8_E4M3FN as GRID
from hswq.hswq_core.quant.grid import GRIDS


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
    assert (row.scaled("Linear"), row.scaled("Conv2d")) == (linear, conv)


def test_only_comfy_may_keep_what_it_cannot_scale():
    assert [name for name, row in FORMATS.items() if row.may_keep_unscaled] == ["comfy"]


@pytest.mark.parametrize("name", FORMATS)
def test_an_unscaled_layer_has_no_extra_tensor(name):
    assert format_named(name).extra_tensors(GRID, None, None) == {}


def test_v2_stores_its_scale_as_one_float32_in_a_vector():
    (key, scale) = next(iter(format_named("v2").extra_tensors(GRID, torch.tensor(0.5), None).items()))
    assert (key, scale.dtype, scale.tolist()) == ("scale", torch.float32, [0.5])


def test_comfy_stores_a_scalar_scale_and_a_marker():
    extra = format_named("comfy").extra_tensors(GRID, torch.tensor(0.5), None)
    assert list(extra) == ["weight_scale", "comfy_quant"]
    assert (extra["weight_scale"].dtype, tuple(extra["weight_scale"].shape)) == (torch.float32, ())
    assert extra["weight_scale"].item() == 0.5


def test_the_comfy_marker_is_json_in_bytes():
    marker = comfy_marker(GRID)
    assert (marker.dtype, marker.dim()) == (torch.uint8, 1)
    assert json.loads(bytes(marker.tolist())) == {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_the_comfy_marker_keeps_what_follows_aligned(grid):
    """Tensors lie back to back in a file: after a marker of 63 bytes, float16 weights would start at odd ones."""
    assert len(comfy_marker(grid)) % 4 == 0
