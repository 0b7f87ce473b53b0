from __future__ import annotations

import pytest
import torch
from hswq.hswq_core.errors import SettingError
from hswq.hswq_core.files.checkpoint import TensorInfo
from hswq.hswq_core.model.layer import Layer
from hswq.hswq_core.plan.budget import (
    BYTES_BESIDE_A_LAYER,
    MB,
    Budget,
    choose_kept,
    kept_bytes,
    size_with,
    smallest_size,
)
from hswq.hswq_core.plan.encoding import Encoding
from hswq.hswq_core.plan.formats import format_named


def test_the_largest_change_per_byte_is_kept_first():
    change = {"a": 8.0, "b": 6.0, "c": 1.0, "d": 0.0}
    cost = {"a": 8, "b": 3, "c": 2, "d": 1}
    assert choose_kept(change, cost, 0) == set()
    assert choose_kept(change, cost, 3) == {"b"}
    assert choose_kept(change, cost, 5) == {"b", "c"}  # a does not fit, c does
    assert choose_kept(change, cost, 11) == {"a", "b"}
    assert choose_kept(change, cost, 99) == {"a", "b", "c"}  # nothing is won by keeping d


def test_equal_changes_are_kept_in_order_of_name():
    assert choose_kept({"b": 1.0, "a": 1.0}, {"a": 1, "b": 1}, 1) == {"a"}


@pytest.mark.parametrize("extra", [-1.0, 101.0, float("nan")])
def test_a_share_out_of_range_is_an_error(extra):
    with pytest.raises(SettingError, match="extra_percent"):
        Budget(extra)


@pytest.mark.parametrize("target", [-1.0, float("inf"), float("nan")])
def test_a_file_size_out_of_range_is_an_error(target):
    with pytest.raises(SettingError, match="target_mb"):
        Budget(target_mb=target)


def test_a_share_is_of_the_smallest_file():
    assert Budget(3.0).extra_bytes(1000, 5) == 30
    assert Budget(0.0).extra_bytes(1000, 5) == 0
    assert Budget(2.5).text == "2.5pct"


def test_a_file_size_leaves_room_for_what_lies_beside_the_weights():
    budget = Budget(3.0, target_mb=8)
    assert budget.text == "8mb"
    assert budget.extra_bytes(6 * MB, 100) == 2 * MB - 100 * BYTES_BESIDE_A_LAYER
    with pytest.raises(SettingError, match=r"target_mb: got 8, expected at least 11 for this model"):
        budget.extra_bytes(9 * MB, 2048)


ENTRIES = {
    "p.fc.weight": TensorInfo(torch.float16, (16, 12)),
    "p.fc.bias": TensorInfo(torch.float16, (16,)),
    "p.conv.weight": TensorInfo(torch.float32, (8, 4, 3, 3)),
    "fc.weight": TensorInfo(torch.float16, (16, 12)),
}
LAYERS = [
    Layer("fc", "Linear", (16, 12), torch.float16),
    Layer("conv", "Conv2d", (8, 4, 3, 3), torch.float32),
]


def test_the_smallest_file_has_a_byte_a_weight_of_the_layers_and_the_rest_as_it_is():
    rest = 2 * 16 + 2 * 192
    for name in ("v1", "v2", "comfy"):
        scheme = Encoding(format_named(name)).scheme
        assert smallest_size(ENTRIES, "p.", LAYERS, scheme) == 192 + 288 + rest
        assert smallest_size(ENTRIES, "p.", LAYERS[:1], scheme) == 192 + 4 * 288 + rest


def test_of_scales_only_those_of_channels_count():
    scheme = Encoding(format_named("v2"), granularity="channel").scheme
    assert smallest_size(ENTRIES, "p.", LAYERS, scheme) == 192 + 4 * 16 + 288 + 4 * 8 + 2 * 16 + 2 * 192


def test_sizes_with_other_weights():
    whole = sum(info.nbytes for info in ENTRIES.values())
    assert size_with(ENTRIES, {}) == whole
    assert size_with(ENTRIES, {"p.fc.weight": 7, "of another file": 10**9}) == whole - 384 + 7
    assert kept_bytes((8, 4, 3, 3)) == 576
