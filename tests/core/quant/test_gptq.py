from __future__ import annotations

import pytest
import torch
from hswq.hswq_core.quant.gptq import BLOCK, MOST_DAMPING, compensated
from hswq.hswq_core.quant.grid import FLOAT8_E4M3FN
from hswq.hswq_core.quant.moments import output_error
from hswq.hswq_core.quant.schemes.table import SCHEMES

GRID = FLOAT8_E4M3FN


def cast(v: torch.Tensor) -> torch.Tensor:
    return SCHEMES["fp8_cast"].fake_quantize(v, GRID.max)


def correlated(width: int, rows: int = 4096) -> torch.Tensor:
    """Gram of inputs that share a few directions, as activations do."""
    x = torch.randn(rows, 8) @ torch.randn(8, width) + 0.3 * torch.randn(rows, width)
    return x.T @ x / rows


@pytest.mark.parametrize("shape", [(32, 48), (32, BLOCK), (16, 2 * BLOCK + 7), (24, 8, 3, 3)])
def test_outputs_err_less_than_with_nearest_rounding(shape):
    w = torch.randn(shape)
    gram = correlated(w[0].numel())
    rounded = compensated(w, gram, cast)
    assert rounded.weight.shape == w.shape
    # 0.02 to 0.06 of nearest's error on these shapes
    assert output_error(rounded.weight - w, gram) < 0.1 * output_error(cast(w) - w, gram)


def test_every_value_is_on_the_grid():
    w = torch.randn(32, 64)
    rounded = compensated(w, correlated(64), cast).weight
    assert torch.equal(cast(rounded), rounded)


def test_uncorrelated_inputs_give_nearest_rounding():
    w = torch.randn(32, 64)
    assert torch.equal(compensated(w, torch.eye(64), cast).weight, cast(w))
    uneven = torch.diag(torch.rand(64) + 0.1)
    assert torch.equal(compensated(w, uneven, cast).weight, cast(w))


def test_two_columns_by_hand():
    """Round to integers; G = [[2, 1], [1, 1]]: column 0 first, its error e moves w_1 by e · G_01 / G_11 = e."""
    w = torch.tensor([[0.4, 0.3], [1.6, -0.2]])
    gram = torch.tensor([[2.0, 1.0], [1.0, 1.0]])
    # row 0: 0.4 -> 0, e = 0.4, w_1 = 0.3 + 0.4 = 0.7 -> 1;  row 1: 1.6 -> 2, e = -0.4, w_1 = -0.6 -> -1
    rounded = compensated(w, gram, torch.round, damping=1e-7)
    assert rounded.weight.tolist() == [[0.0, 1.0], [2.0, -1.0]]


def test_the_larger_diagonal_goes_first():
    w = torch.tensor([[0.3, 0.4], [-0.2, 1.6]])
    gram = torch.tensor([[1.0, 1.0], [1.0, 2.0]])
    assert compensated(w, gram, torch.round, damping=1e-7).weight.tolist() == [[1.0, 0.0], [-1.0, 2.0]]


def test_the_order_of_columns_does_not_matter():
    w, gram = torch.randn(16, 40), correlated(40)
    shuffle = torch.randperm(40)
    one = compensated(w, gram, cast).weight
    other = compensated(w[:, shuffle], gram[shuffle][:, shuffle], cast).weight
    assert torch.equal(other, one[:, shuffle])


def test_blocks_change_nothing_but_the_order_of_sums(monkeypatch):
    from hswq.hswq_core.quant import gptq as compensate

    w, gram = torch.randn(16, 100), correlated(100)
    monkeypatch.setattr(compensate, "BLOCK", 100)
    whole = compensated(w, gram, cast).weight
    monkeypatch.setattr(compensate, "BLOCK", 7)
    pieces = compensated(w, gram, cast).weight
    assert (whole != pieces).float().mean() < 0.01  # a value on the edge between two codes may fall either way
    assert output_error(pieces - w, gram) == pytest.approx(output_error(whole - w, gram), rel=0.02)


def test_columns_that_no_input_reaches_are_nearest_and_counted():
    w, gram = torch.randn(16, 24), correlated(24)
    for column in (3, 17):
        gram[column] = gram[:, column] = 0
    rounded = compensated(w, gram, cast)
    assert rounded.dead == 2
    assert torch.equal(rounded.weight[:, [3, 17]], cast(w[:, [3, 17]]))


def test_no_input_at_all_is_nearest_rounding():
    w = torch.randn(16, 24)
    rounded = compensated(w, torch.zeros(24, 24), cast)
    assert rounded.dead == 24
    assert torch.equal(rounded.weight, cast(w))


def test_fewer_rows_than_columns_still_give_a_factor():
    x = torch.randn(4, 64)
    w, gram = torch.randn(16, 64), x.T @ x / 4
    rounded = compensated(w, gram, cast)
    assert 0.01 <= rounded.damping <= MOST_DAMPING
    assert rounded.weight.isfinite().all()
    assert output_error(rounded.weight - w, gram) < output_error(cast(w) - w, gram)


def test_a_gram_that_no_damping_mends_gives_nearest_rounding():
    w = torch.randn(8, 6)
    gram = -torch.ones(6, 6) + torch.diag(torch.full((6,), 2.0))  # diagonal 1, eigenvalue -4
    rounded = compensated(w, gram, cast)
    assert rounded.damping >= MOST_DAMPING
    assert torch.equal(rounded.weight, cast(w))


def test_neither_weight_nor_gram_is_changed():
    w, gram = torch.randn(16, 24), correlated(24)
    before = (w.clone(), gram.clone())
    compensated(w, gram, cast)
    assert torch.equal(w, before[0])
    assert torch.equal(gram, before[1])
