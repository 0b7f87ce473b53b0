from __future__ import annotations

import math

import pytest
import torch
from hswq.hswq_core.errors import LayerError
from hswq.hswq_core.model.kinds import KINDS, Window
from hswq.hswq_core.quant.moments import Gram, Held, Moments, Rows, output_error


def held_of(*parts: torch.Tensor) -> Rows | Moments:
    held = Held("layer", parts[0].shape[1])
    for part in parts:
        held.add(part)
    return held.inputs()


@pytest.mark.parametrize(("rows", "kind"), [(3, Rows), (8, Rows), (9, Moments), (40, Moments)])
def test_fewer_rows_than_columns_stay_rows_and_say_the_same(rows, kind):
    x, delta = torch.randn(rows, 8) + 0.5, torch.randn(5, 8)
    found = held_of(x[:2], x[2:])
    gram = Gram("layer", 8)
    gram.add(x)
    assert type(found) is kind
    assert found.error(delta) == pytest.approx(output_error(delta, gram.moments().gram), rel=1e-5)
    assert found.error(delta) == pytest.approx((x @ delta.T).square().sum(1).mean().item(), rel=1e-5)
    torch.testing.assert_close(found.mean, x.mean(0))


def test_inputs_changed_behind_the_layer_do_not_matter():
    x, delta = torch.randn(3, 8), torch.randn(5, 8)
    held = Held("layer", 8)
    held.add(x)
    wanted = (x @ delta.T).square().sum(1).mean().item()
    x.zero_()
    assert held.inputs().error(delta) == pytest.approx(wanted, rel=1e-5)


def test_a_grouped_convolution_sees_the_inputs_of_its_groups():
    x, delta = torch.randn(5, 8), torch.randn(6, 4)  # two groups
    wanted = (x[:, :4] @ delta[:3].T).square().sum(1) + (x[:, 4:] @ delta[3:].T).square().sum(1)
    assert held_of(x).error(delta) == pytest.approx(wanted.mean().item(), rel=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("rows", [3, 20])
def test_what_cannot_be_used_is_an_error_that_names_the_layer(bad, rows):
    x = torch.randn(rows, 8)
    x[1, 1] = bad
    with pytest.raises(LayerError, match=r"Layer layer.*NaN or infinity"):
        held_of(x)
    with pytest.raises(LayerError, match="got no input"):
        Held("layer", 8).inputs()
    with pytest.raises(LayerError, match="got 9 columns, expected 8"):
        Held("layer", 8).add(torch.randn(3, 9))


@pytest.mark.parametrize(
    ("kind", "shape", "window"),
    [
        ("Linear", (2, 7, 5), Window()),
        ("Conv2d", (2, 4, 9, 8), Window((3, 3), (2, 1), (1, 1), (1, 2))),
        ("Conv2d", (4, 9, 8), Window((1, 1))),
    ],
)
def test_rows_are_counted_without_being_made(kind, shape, window):
    x = torch.randn(shape)
    assert KINDS[kind].count(x, window) == sum(map(len, KINDS[kind].rows(x, window)))
