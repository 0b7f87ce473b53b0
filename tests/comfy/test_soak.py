"""A short version of the long calibration in bench/soak.py."""

from __future__ import annotations

import pytest
import soak
from rig.server import ComfyServer

pytestmark = pytest.mark.comfy

RUNS = 12


def test_no_call_is_lost_or_counted_twice(threads):
    with ComfyServer([soak.TESTNODES], threads=threads) as server:
        found = soak.soak(server, RUNS)
    assert found.calls == RUNS * soak.STEPS
    assert found.to_calls < 1e-9
    # A single call is measured in float32.
    assert found.to_float64 < 1e-6
    assert found.growth_mb < 20
