from __future__ import annotations

import pytest
import torch
from hswq.hswq_core.quant.cholesky import PANEL, factorize_


def positive(width: int) -> torch.Tensor:
    x = torch.randn(3 * width, width)
    return x.T @ x / len(x) + 0.05 * torch.eye(width)


@pytest.mark.parametrize("width", [1, 7, PANEL, 2 * PANEL + 3])
def test_the_factor_is_the_library_s(width):
    h = positive(width)
    wanted = torch.linalg.cholesky(h)
    assert factorize_(h, lambda: None)
    torch.testing.assert_close(h.tril(), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("column", [0, 3, PANEL + 5])
def test_a_matrix_without_a_factor_is_told(column):
    h = positive(PANEL + 8)
    h[column, column] = -1.0
    assert not factorize_(h, lambda: None)


def test_every_panel_can_be_the_last():
    class CancelledError(Exception):
        pass

    ticks = []

    def tick() -> None:
        ticks.append(1)
        if len(ticks) == 2:
            raise CancelledError

    with pytest.raises(CancelledError):
        factorize_(positive(3 * PANEL), tick)
    assert len(ticks) == 2
