"""In-place Cholesky factorization, panel by panel: no second matrix in memory, and a callback between panels.

The second moments of a convolution with 2,560 channels have 23,040 columns and take 2.1 GB; the library call would hold
them twice and could not be cancelled while it runs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

PANEL = 512

Tick = Callable[[], None]


def factorize_(h: torch.Tensor, tick: Tick) -> bool:
    """Overwrite ``h`` with L, L Lᵀ = H; entries above the diagonal are left untouched.

    Args:
        h: symmetric [k, k]; only its lower triangle is read. Overwritten even on failure.
        tick: called before each panel; may raise to cancel.

    Returns:
        False if H is not positive definite.
    """
    for start in range(0, len(h), PANEL):
        tick()
        stop = min(start + PANEL, len(h))
        panel = h[start:, start:stop]
        panel.addmm_(h[start:, :start], h[start:stop, :start].T, alpha=-1)
        tile, failed = torch.linalg.cholesky_ex(panel[: stop - start])
        if failed:
            return False
        panel[: stop - start] = tile
        below = panel[stop - start :]
        below.copy_(torch.linalg.solve_triangular(tile.T, below, upper=True, left=False))
    return True
