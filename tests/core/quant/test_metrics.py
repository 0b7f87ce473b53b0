from __future__ import annotations

import math

import pytest
import torch
from hswq.hswq_core.quant.metrics import error_to_db, relative_error, sqnr_db, weighted_square_sum


def test_relative_error_by_hand():
    """Reference of norm 5, difference of norm 0.5."""
    assert relative_error(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])) == 0.1


def test_sqnr_is_20_log10_of_signal_over_noise():
    assert sqnr_db(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])) == pytest.approx(20.0, abs=1e-9)
    assert error_to_db(0.01) == pytest.approx(40.0, abs=1e-9)


def test_sqnr_does_not_depend_on_the_magnitude():
    x, noise = torch.randn(1000), torch.randn(1000) * 0.01
    assert sqnr_db(x * 2**20, (x + noise) * 2**20) == pytest.approx(sqnr_db(x, x + noise), abs=1e-9)


def test_equal_tensors_have_no_error():
    x = torch.randn(10)
    assert relative_error(x, x.clone()) == 0.0
    assert sqnr_db(x, x.clone()) == math.inf


def test_a_zero_reference():
    zero = torch.zeros(3)
    assert relative_error(zero, zero) == 0.0
    assert relative_error(zero, torch.ones(3)) == math.inf
    assert sqnr_db(zero, torch.ones(3)) == -math.inf


def test_half_precision_inputs_do_not_overflow():
    """The squared norm of 1,000 values of 60,000 is 3.6e12."""
    x = torch.full((1000,), 60_000.0, dtype=torch.float16)
    assert relative_error(x, x * 0.5) == 0.5


def test_norms_do_not_drift_over_many_values():
    x = torch.full((2**22,), 0.37)
    assert relative_error(x, torch.full_like(x, 0.74)) == pytest.approx(1.0, rel=1e-6)


def test_weighted_square_sum_by_hand():
    """Errors 1 and 2 in channels of importance 3 and 1, over two rows: 2·(3·1 + 1·4)."""
    x = torch.zeros(2, 2)
    total = weighted_square_sum(x, torch.tensor([[1.0, 2.0], [-1.0, -2.0]]), torch.tensor([[3.0, 1.0]]))
    assert (total.dtype, total.item()) == (torch.float64, 14.0)


def test_weighted_square_sum_over_a_convolution_repeats_the_importance():
    approximation = torch.ones(2, 2, 3, 3)
    approximation[:, 1] = 2.0
    importance = torch.tensor([3.0, 1.0]).view(1, 2, 1, 1)
    assert weighted_square_sum(torch.zeros(2, 2, 3, 3), approximation, importance).item() == 9 * 14.0


def test_weighted_square_sum_without_importance_is_the_sum_of_squares():
    assert weighted_square_sum(torch.zeros(4), torch.tensor([1.0, 1.0, 3.0, 1.0]), None).item() == 12.0


def test_weighted_square_sum_does_not_drift_over_many_values():
    x = torch.full((2**22,), 0.1)
    expected = 2**22 * x[0].square().item()
    assert weighted_square_sum(torch.zeros_like(x), x, None).item() == pytest.approx(expected, rel=1e-12)


def test_inputs_are_left_alone():
    x, y, importance = torch.randn(3, 4), torch.randn(3, 4), torch.rand(1, 4)
    before = x.clone(), y.clone(), importance.clone()
    weighted_square_sum(x, y, importance)
    relative_error(x, y)
    assert all(torch.equal(a, b) for a, b in zip((x, y, importance), before, strict=True))
