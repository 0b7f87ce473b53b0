from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch
from hswq.hswq_core.errors import LayerError
from hswq.hswq_core.methods.exclusions import Exclusions
from hswq.hswq_core.methods.method import Task
from hswq.hswq_core.methods.nearest import plan_nearest
from hswq.hswq_core.methods.solutions import Solutions
from hswq.hswq_core.model.families import FAMILIES, GENERIC
from hswq.hswq_core.model.layer import Layer
from hswq.hswq_core.plan.encoding import Encoding
from hswq.hswq_core.plan.formats import UNSCALED_CONV_MAX_LOSS_DB, format_named
from hswq.hswq_core.plan.plan import KEEP, QUANTIZE, SKIP, Plan
from hswq.hswq_core.quant.schemes.table import SCHEMES

LINEAR, CONV = (160, 128), (64, 32, 3, 3)


def planned(weights: dict[str, torch.Tensor], file_format: str, exclusions: Exclusions | None = None) -> Plan:
    layers = [Layer(n, "Linear" if w.dim() == 2 else "Conv2d", tuple(w.shape), w.dtype) for n, w in weights.items()]
    task = Task(
        layers=layers,
        read=lambda layer: weights[layer.name],
        exclusions=exclusions or Exclusions(GENERIC),
        encoding=Encoding(format_named(file_format)),
        solutions=Solutions(Path(os.devnull)),  # takes none
    )
    found = plan_nearest(task)
    assert (dict(found.solutions), found.notes) == ({}, ())
    return found.plan


@pytest.mark.parametrize("file_format", ["v1", "v2", "comfy"])
def test_amax_is_the_largest_weight_and_the_codes_are_torchs(file_format):
    w = torch.randn(LINEAR).half()
    (layer,) = planned({"l": w}, file_format).layers
    assert (layer.action, layer.reason) == (QUANTIZE, "nearest")
    assert layer.amax == w.abs().max().item()
    assert layer.scaled == (file_format != "v1")
    assert layer.scheme == ("fp8" if layer.scaled else "fp8_cast")
    codes = SCHEMES[layer.scheme].nearest_tensors(w, layer.amax)["weight"]
    divisor = layer.amax / 448 if layer.scaled else 1.0
    assert torch.equal(codes.float(), (w.float() / divisor).to(torch.float8_e4m3fn).float())


def test_no_statistics_are_needed_and_the_books_are_closed():
    weights = {"out.2": torch.randn(CONV), "tiny": torch.randn(8, 8), "l": torch.randn(LINEAR)}
    plan = planned(weights, "v2", Exclusions(FAMILIES[0]))
    assert {layer.name: layer.action for layer in plan.layers} == {"out.2": SKIP, "tiny": SKIP, "l": QUANTIZE}
    everything = planned(weights, "v2", Exclusions.as_published(FAMILIES[0]))
    assert everything.counts() == {QUANTIZE: 3, KEEP: 0, SKIP: 0}
    assert (plan.method, plan.budget) == ("nearest", "")


def test_comfy_keeps_a_convolution_that_an_unscaled_cast_would_hurt():
    # float8's smallest steps are 2^-9: weights of that size lose most of their bits without a scale
    plan = planned({"small": torch.randn(CONV) * 2**-8, "usual": torch.randn(CONV) * 2**-3}, "comfy")
    assert [layer.action for layer in plan.layers] == [KEEP, QUANTIZE]
    assert f"{UNSCALED_CONV_MAX_LOSS_DB:g} dB" in plan.layers[0].reason


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_is_an_error_that_names_the_layer(bad):
    w = torch.randn(LINEAR)
    w[3, 3] = bad
    with pytest.raises(LayerError, match="Layer l, weight: got NaN or infinity"):
        planned({"l": w}, "v2")


def test_a_weight_beyond_float32_is_one_too():
    w = torch.full(LINEAR, 1e300, dtype=torch.float64)
    for file_format in ("v1", "v2"):
        with pytest.raises(LayerError, match="Layer l, weight: got NaN or infinity in float32"):
            planned({"l": w}, file_format)


def test_a_layer_already_in_fp8_is_an_error_that_names_it():
    with pytest.raises(LayerError, match=r"Layer l.*already FP8"):
        planned({"l": torch.randn(LINEAR).to(torch.float8_e4m3fn)}, "v2")
