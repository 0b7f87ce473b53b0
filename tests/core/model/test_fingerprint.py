from __future__ import annotations

import math

import pytest
import torch
from hswq.hswq_core.errors import SessionError
from hswq.hswq_core.model.fingerprint import Fingerprint, layout_hash, sample_weights

LAYOUT = {"b": ("Linear", (4, 8)), "a": ("Conv2d", (4, 2, 3, 3))}


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {f"layer{i}": torch.randn(64, 64, generator=g) * 0.02 for i in range(50)}


def fingerprint(model: dict[str, torch.Tensor], layout: str = "x") -> Fingerprint:
    return Fingerprint(layout, sample_weights(model, lambda name: model[name]))


def test_layout_hash_does_not_depend_on_order():
    assert layout_hash(LAYOUT) == layout_hash(dict(reversed(LAYOUT.items())))


@pytest.mark.parametrize(
    "other",
    [
        {"b": ("Linear", (4, 8))},
        {**LAYOUT, "b": ("Linear", (8, 4))},
        {**LAYOUT, "a": ("Linear", (4, 2, 3, 3))},
        {"b": ("Linear", (4, 8)), "c": ("Conv2d", (4, 2, 3, 3))},
    ],
)
def test_layout_hash_sees_names_kinds_and_shapes(other):
    assert layout_hash(LAYOUT) != layout_hash(other)


def test_four_evenly_spaced_weights_of_each_layer_in_order_of_name():
    model = {"b": torch.arange(10.0), "a": torch.arange(100.0, 131.0).reshape(31, 1)}
    sampled = sample_weights(model, lambda name: model[name])
    assert sampled.dtype == torch.float32
    assert sampled.tolist() == [100.0, 110.0, 120.0, 130.0, 0.0, 3.0, 6.0, 9.0]


def test_a_layer_of_one_weight_and_a_model_of_no_layer():
    assert sample_weights(["a"], lambda _: torch.tensor([[5.0]])).tolist() == [5.0] * 4
    assert sample_weights([], lambda _: torch.tensor(0.0)).tolist() == []


@pytest.mark.parametrize("shape", [(1280, 2560, 3, 3), (10240, 2560)])
def test_layers_larger_than_float32_can_count_are_sampled(shape):
    """SDXL's largest convolution has 29,491,200 weights; float32 rounds the last index up, beyond the end."""
    w = torch.zeros(shape, dtype=torch.int8)
    w.view(-1)[-1] = 7
    assert sample_weights(["conv"], lambda _: w).tolist() == [0.0, 0.0, 0.0, 7.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_same_model_in_another_dtype_is_the_same(dtype):
    model = weights()
    rounded = {name: w.to(dtype) for name, w in model.items()}
    fingerprint(model).require_same(fingerprint(rounded), "Test")
    fingerprint(rounded).require_same(fingerprint(model), "Test")


def test_a_finetune_is_another_model():
    model = weights()
    tuned = {name: w + 0.02 * w.std() * torch.randn(w.shape) for name, w in model.items()}
    with pytest.raises(SessionError, match="other weights"):
        fingerprint(model).require_same(fingerprint(tuned), "Test")


def test_another_layout_is_another_model():
    model = weights()
    with pytest.raises(SessionError, match="another layer layout"):
        fingerprint(model, "x").require_same(fingerprint(model, "y"), "Test")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_model_of_nan_is_never_the_same(bad):
    model = weights()
    broken = {**model, "layer0": torch.full((64, 64), bad)}
    with pytest.raises(SessionError):
        fingerprint(model).require_same(fingerprint(broken), "Test")


def test_two_models_of_zeros_are_the_same():
    zeros = {"a": torch.zeros(8, 8)}
    fingerprint(zeros).require_same(fingerprint(zeros), "Test")
    with pytest.raises(SessionError):
        fingerprint(zeros).require_same(fingerprint({"a": torch.ones(8, 8)}), "Test")


def test_the_short_form_is_the_start_of_the_layout():
    digest = layout_hash(LAYOUT)
    assert len(digest) == 64
    assert Fingerprint(digest, torch.zeros(8)).short == digest[:12]
