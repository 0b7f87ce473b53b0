"""Whether calibration is enough: distances computed by hand, and what is said about them."""

from __future__ import annotations

import pytest
import torch
from hswq.hswq_core.calibration.history import Point
from hswq.hswq_core.calibration.session import Session
from hswq.hswq_core.reports.convergence import (
    ENOUGH,
    MORE,
    UNKNOWN,
    Distance,
    KeptCalls,
    distances,
    never_quantized,
    verdict,
)

NAMES = [f"layer_{i}" for i in range(8)]  # 0.25 of eight: two are kept


@pytest.fixture
def session(session_of, stats_of) -> Session:
    """Sensitivities 0 to 7, all levels 1, 40 calls."""
    shapes = dict.fromkeys(NAMES, (256, 128))
    layers = {name: stats_of("Linear", shapes[name], sensitivity=float(i), calls=40) for i, name in enumerate(NAMES)}
    made = session_of({name: torch.ones(shape) for name, shape in shapes.items()}, layers)
    made.images = 2
    return made


def point(calls: int, sensitivity: list[float], level: list[float], images: int = 1) -> Point:
    return Point(calls, images, torch.tensor(sensitivity), torch.tensor(level))


def test_now_is_no_distance_from_now(session):
    (now,) = distances(session, {})
    assert (now.calls, now.changed, now.kept, now.level, now.common) == (40, 0, 2, 0.0, 1.0)


def test_distances_are_kept_layers_lost_and_the_median_deviation_of_levels(session):
    then = [9.0, 1, 2, 3, 4, 5, 6, 7]  # layers 0 and 7 are kept, now 6 and 7
    levels = [1.0, 1.1, 0.9, 1.1, 1.2, 0.8, 1.2, 1.2]  # apart 0, .1, .1, .1, .2, .2, .2, .2: the lower median is 0.1
    session.history = (point(20, then, levels),)
    early, now = distances(session, {})
    assert (early.calls, early.images, early.changed, early.kept) == (20, 1, 1, 2)
    assert early.level == pytest.approx(0.1)
    assert early.common == 0.5
    assert now.changed == 0


def test_excluded_layers_are_not_chosen_among(session):
    session.history = (point(20, [9.0, 1, 2, 3, 4, 5, 6, 7], [1.0] * 8),)
    early, now = distances(session, {"layer_0"})  # int(7 · 0.25) = 1 of the other seven: layer 7, then and now
    assert (early.changed, early.kept, now.kept) == (0, 1, 1)


def test_a_layer_that_is_never_called_has_no_deviation(session, stats_of):
    for name in NAMES[:5]:
        session.layers[name] = stats_of("Linear", (256, 128), calls=0)
    session.history = (point(20, [0.0] * 8, [7.0] * 5 + [1.5] * 3),)
    assert distances(session, {})[0].level == pytest.approx(0.5)


def test_a_point_of_all_the_calls_is_now(session):
    session.history = (point(40, [0.0] * 8, [0.0] * 8),)
    assert len(distances(session, {})) == 1


def test_what_hswq_never_quantizes_is_known_without_the_model(session, stats_of):
    session.layers["tiny"] = stats_of("Linear", (64, 64))
    session.layers["idle"] = stats_of("Linear", (256, 128), calls=0)
    assert never_quantized(session) == {"tiny": "at most 16 K weights", "idle": "not used by the calibrated workflow"}


def far(calls: int, level: float, changed: int, kept: int = 100, images: int = 1) -> Distance:
    return Distance(calls, images, changed, kept, level)


def end(calls: int = 160, kept: int = 100, images: int = 8) -> Distance:
    return Distance(calls, images, 0, kept, 0.0)


def test_enough_is_said_with_its_numbers():
    found = verdict([far(20, 0.5, 50), far(80, 0.012, 3, kept=198), end(kept=198)])
    assert found.answer == ENOUGH
    assert found.text == (
        "Enough: the last doubling of the calls (from 80 to 160) changed layers' statistics by 1.2% "
        "and 3 of 198 kept layers."
    )


@pytest.mark.parametrize(
    ("level", "changed", "more"),
    [
        (0.04, 0, 24),  # twice the 2 % allowed: four times the 8 pictures
        (0.0, 10, 24),  # twice the 5 of 100 allowed
        (0.03, 0, 10),  # 1.5² - 1 = 1.25
        (0.0201, 0, 1),
        (0.9, 0, 256),  # never more than HSWQ's authors ask for
    ],
)
def test_not_enough_says_how_many_more(level, changed, more):
    found = verdict([far(80, level, changed), end()])
    assert found.answer == MORE
    assert found.text.endswith(f"Generate {more} more prompt{'s' if more > 1 else ''}.")
    assert found.text.startswith("Not enough yet: the last doubling of the calls (from 80 to 160)")


def test_one_layer_may_always_change_places():
    assert verdict([far(80, 0.0, 1, kept=4), end(kept=4)]).answer == ENOUGH
    assert verdict([far(80, 0.0, 2, kept=4), end(kept=4)]).answer == MORE


@pytest.mark.parametrize(
    "earlier",
    [
        [],
        [far(20, 0.0, 0)],  # an eighth of the calls says nothing about the last doubling
        [far(159, 0.0, 0)],
        [far(80, 0.0, 0, images=0)],  # in the middle of the first picture
    ],
)
def test_too_few_points_are_no_verdict(earlier):
    found = verdict([*earlier, end()])
    assert found.answer == UNKNOWN
    assert "Too few points" in found.text


def test_the_point_nearest_to_half_is_taken():
    found = verdict([far(50, 0.9, 0), far(90, 0.0, 0), far(110, 0.9, 0), end()])
    assert found.answer == ENOUGH
    assert "from 90 to 160" in found.text


def test_text_encoders_count_prompts_as_calls():
    found = verdict([far(4, 0.04, 0, images=0), end(calls=8, images=0)])
    assert found.text.endswith("Generate 24 more prompts.")


@pytest.mark.parametrize(
    ("calls", "prompts", "answer", "said"),
    [
        (0, 0, MORE, "states above 0"),
        (20, 1, MORE, "20 calls of 1 prompt kept. Generate 11 more prompts."),
        (128, 11, MORE, "Generate 1 more prompt."),
        (64, 12, MORE, "Usable: 64 calls of 12 prompts kept; 128 calls"),
        (128, 12, ENOUGH, "Enough: 128 calls of 12 prompts kept."),
    ],
)
def test_kept_calls_are_judged_by_the_converters_own_threshold(calls, prompts, answer, said):
    found = KeptCalls(calls, prompts).verdict()
    assert found.answer == answer
    assert said in found.text
