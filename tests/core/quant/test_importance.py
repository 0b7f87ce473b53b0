from __future__ import annotations

import math

import pytest
import torch
from hswq.hswq_core.errors import LayerError
from hswq.hswq_core.quant.clip_search import importance_over_weight


def test_a_linear_gets_its_importance_per_column():
    spread = importance_over_weight("fc", (2, 3), torch.tensor([1.0, 2.0, 3.0]).double())
    assert spread.dtype == torch.float32
    assert spread.tolist() == [[1.0, 2.0, 3.0]]


def test_a_convolution_gets_its_importance_per_input_channel():
    spread = importance_over_weight("conv", (5, 2, 3, 3), torch.tensor([1.0, 2.0]))
    assert tuple(spread.shape) == (1, 2, 1, 1)
    assert spread.flatten().tolist() == [1.0, 2.0]


def test_each_group_of_a_convolution_gets_its_own_channels():
    """4 outputs in 2 groups of 3 channels: outputs 0, 1 read channels 0-2, outputs 2, 3 read channels 3-5."""
    spread = importance_over_weight("conv", (4, 3, 1, 1), torch.arange(6.0))
    assert tuple(spread.shape) == (4, 3, 1, 1)
    assert spread.flatten(1).tolist() == [[0, 1, 2], [0, 1, 2], [3, 4, 5], [3, 4, 5]]


def test_a_depthwise_convolution():
    spread = importance_over_weight("conv", (3, 1, 3, 3), torch.tensor([7.0, 8.0, 9.0]))
    assert spread.flatten().tolist() == [7.0, 8.0, 9.0]


@pytest.mark.parametrize("length", [0, 1, 100, 511, 513, 2000, 1024])
def test_a_linear_of_512_inputs_accepts_512_values_only(length):
    """1024 would be two groups, which a Linear does not have."""
    with pytest.raises(LayerError, match=r"blocks\.0\.fc.*512"):
        importance_over_weight("blocks.0.fc", (64, 512), torch.ones(length))


@pytest.mark.parametrize("length", [0, 1, 100, 2000, 512 * 3])
def test_a_convolution_of_512_inputs_and_64_outputs_accepts_whole_groups_only(length):
    with pytest.raises(LayerError, match=r"conv"):
        importance_over_weight("conv", (64, 512, 3, 3), torch.ones(length))


def test_a_matrix_is_no_importance():
    with pytest.raises(LayerError):
        importance_over_weight("fc", (64, 512), torch.ones(1, 512))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_values_that_cannot_be_a_mean_magnitude_are_refused(bad):
    values = torch.ones(4)
    values[2] = bad
    with pytest.raises(LayerError, match=r"fc"):
        importance_over_weight("fc", (2, 4), values)
