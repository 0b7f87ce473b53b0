from __future__ import annotations

import pytest
from hswq.hswq_core.calibration.observer import is_measured

EVERY = [2, 3, 4, 7, 10, 100]


def measured(every: int, calls: range) -> int:
    return sum(is_measured(call, every) for call in calls)


def test_one_in_one_is_all():
    assert measured(1, range(1000)) == 1000


@pytest.mark.parametrize("every", EVERY)
def test_the_first_call_is_measured(every):
    assert is_measured(0, every)


@pytest.mark.parametrize("every", EVERY)
@pytest.mark.parametrize("stretch", [20, 100, 1000])
def test_any_stretch_has_its_share(every, stretch):
    for start in range(500):
        assert abs(measured(every, range(start, start + stretch)) - stretch / every) <= 2.5


@pytest.mark.parametrize("every", EVERY)
@pytest.mark.parametrize("period", [2, 3, 4, 8, 20, 21, 30, 40])
def test_no_member_of_a_pattern_is_left_out(every, period):
    """Steps of a run, or the positive and the negative prompt in turn."""
    for member in range(period):
        share = measured(every, range(member, 400 * every * period, period)) / 400 / every
        assert share == pytest.approx(1 / every, rel=0.1)
