from __future__ import annotations

import math

import pytest
import torch
from hswq.hswq_core.errors import LayerError
from hswq.hswq_core.model.kinds import KINDS, ONE_POSITION, Window
from hswq.hswq_core.quant.moments import Gram, output_error
from torch.nn import functional

WINDOWS = [
    Window((3, 3), (1, 1), (1, 1), (1, 1)),
    Window((3, 3), (2, 2), (1, 1), (1, 1)),
    Window((1, 1), (1, 1), (0, 0), (1, 1)),
    Window((3, 2), (1, 2), (2, 0), (2, 1)),
]


def gram_of(x: torch.Tensor, kind: str, width: int, window: Window | None = None) -> Gram:
    gram = Gram("layer", width)
    for rows in KINDS[kind].rows(x, window or ONE_POSITION):
        gram.add(rows)
    return gram


@pytest.mark.parametrize("shape", [(7, 5), (2, 7, 5), (2, 3, 7, 5)])
def test_linear_rows_are_the_last_axis(shape):
    x = torch.randn(shape)
    gram = gram_of(x, "Linear", 5)
    rows = x.reshape(-1, 5)
    assert gram.rows == len(rows)
    found = gram.moments()
    torch.testing.assert_close(found.gram, rows.T @ rows / len(rows))
    torch.testing.assert_close(found.mean, rows.mean(0))
    assert found.rows == len(rows)


@pytest.mark.parametrize("window", WINDOWS)
def test_rows_times_the_flattened_weight_are_the_convolution(window):
    x, w = torch.randn(2, 4, 9, 8), torch.randn(6, 4, *window.kernel)
    wanted = functional.conv2d(x, w, None, window.stride, window.padding, window.dilation)
    rows = torch.cat(list(KINDS["Conv2d"].rows(x, window)))
    found = (rows @ w.flatten(1).T).view(2, *wanted.shape[2:], 6).permute(0, 3, 1, 2)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    (single,) = KINDS["Conv2d"].rows(x[0], window)
    assert torch.equal(single, rows[: len(rows) // 2])


def test_calls_add_up_whatever_their_dtype():
    x = torch.randn(64, 8).half()
    whole = gram_of(x, "Linear", 8)
    halves = Gram("layer", 8)
    for part in x.split(32):
        for rows in KINDS["Linear"].rows(part, ONE_POSITION):
            halves.add(rows)
    assert halves.rows == whole.rows == 64
    found = whole.moments()
    torch.testing.assert_close(halves.moments().gram, found.gram)
    torch.testing.assert_close(found.gram, x.float().T @ x.float() / 64)


@pytest.mark.parametrize("window", WINDOWS[:2])
def test_the_error_is_the_mean_square_change_of_the_output(window):
    x, w = torch.randn(3, 4, 8, 8), torch.randn(6, 4, 3, 3)
    rounded = (w * 4).round() / 4
    options = (None, window.stride, window.padding, window.dilation)
    change = functional.conv2d(x, rounded, *options) - functional.conv2d(x, w, *options)
    wanted = change.square().mean((0, 2, 3)).sum().item()
    found = output_error(rounded - w, gram_of(x, "Conv2d", 36, window).moments().gram)
    assert found == pytest.approx(wanted, rel=1e-4)


def test_no_error_costs_nothing():
    assert output_error(torch.zeros(3, 4), torch.eye(4)) == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_inputs_that_are_not_finite_are_an_error_that_names_the_layer(bad):
    x = torch.randn(4, 8)
    x[1, 1] = bad
    with pytest.raises(LayerError, match=r"Layer layer.*NaN or infinity"):
        gram_of(x, "Linear", 8).moments()


def test_no_input_and_the_wrong_width_are_errors():
    with pytest.raises(LayerError, match="got no input"):
        Gram("layer", 8).moments()
    with pytest.raises(LayerError, match="got 9 columns, expected 8"):
        Gram("layer", 8).add(torch.randn(3, 9))


@pytest.mark.parametrize("width", [512, 700, 1024, 1100])
def test_wide_moments_are_summed_in_panels_and_are_those_of_the_whole_product(width):
    """512 columns at a time, half of the products: the other half is its mirror image."""
    x = torch.randn(64, width)
    gram = gram_of(x, "Linear", width).moments().gram
    torch.testing.assert_close(gram.double(), x.double().T @ x.double() / 64, atol=1e-5, rtol=1e-5)
    assert torch.equal(gram, gram.T)
