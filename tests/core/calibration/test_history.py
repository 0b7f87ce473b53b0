"""How a session stood at earlier saves: hand-computed, bounded, merged, saved, and refused where damaged."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hswq.hswq_core.calibration.history import MAX_POINTS, Point, joined, point_of
from hswq.hswq_core.calibration.observer import LayerStats
from hswq.hswq_core.calibration.session import Session, load_session, save_session
from hswq.hswq_core.errors import SessionError

LAYERS = ("b", "a")


def stats(calls: int, sensitivity: float, level: float) -> LayerStats:
    """Of a layer of four inputs, the levels of its channels 0, 0, 2, 2 times ``level``."""
    channels = torch.tensor([0.0, 0.0, 2.0, 2.0], dtype=torch.float64) * level * calls
    return LayerStats("Linear", (3, 4), calls, calls, 2.0 * calls, (sensitivity + 4.0) * calls, channels, channels, 1.0)


def layers(calls: int) -> dict[str, LayerStats]:
    return {"b": stats(calls, 3.0, 0.5), "a": stats(calls, 1.0, 0.25)}


@pytest.fixture
def session(session_of) -> Session:
    return session_of({name: torch.ones(3, 4) for name in LAYERS}, layers(8))


def at(calls: int, images: int = 0) -> Point:
    return Point(calls, images, torch.zeros(2), torch.zeros(2))


def calls_of(history) -> list[int]:
    return [point.calls for point in history]


def test_a_point_holds_variance_and_mean_input_of_each_layer_in_order_of_name():
    found = point_of(layers(8), 8, 2)
    assert (found.calls, found.images) == (8, 2)
    assert found.sensitivity.dtype == found.level.dtype == torch.float32
    assert found.sensitivity.tolist() == [1.0, 3.0]
    assert found.level.tolist() == [0.25, 0.5]


def test_a_layer_never_called_is_at_zero():
    found = point_of({"a": LayerStats.empty("Linear", (3, 4), 4)}, 8, 2)
    assert (found.sensitivity.tolist(), found.level.tolist()) == ([0.0], [0.0])


def test_what_float32_cannot_hold_stays_finite_and_readable(session, tmp_path):
    session.layers["a"].out_sq_sum = 1e300
    session.remember()
    save_session(session, tmp_path / "s.pt")
    (point,) = load_session(tmp_path / "s.pt").history
    assert point.sensitivity.tolist() == [torch.finfo(torch.float32).max, 3.0]


def test_a_full_history_loses_the_point_with_the_closest_neighbours():
    history = joined([at(2**i) for i in range(MAX_POINTS)])
    assert len(history) == MAX_POINTS
    grown = joined(history, [at(24)])  # 16 and 32 lie closest around it
    assert calls_of(grown) == calls_of(history)
    grown = joined(history, [at(2**MAX_POINTS)])  # all gaps are alike: the first that is no end goes
    assert calls_of(grown) == [1, *(2**i for i in range(2, MAX_POINTS + 1))]


def test_however_long_it_grows_it_spans_all_and_is_dense_nowhere():
    history = ()
    for calls in range(20, 20_001, 20):
        history = joined(history, [at(calls)])
    found = calls_of(history)
    assert len(found) == MAX_POINTS
    assert (found[0], found[-1]) == (20, 20_000)
    assert max(b / a for a, b in itertools.pairwise(found)) <= 2.0
    assert any(0.4 <= calls / 20_000 <= 0.6 for calls in found)


def test_remembering_notes_the_whole_session(session):
    session.remember()
    session.merge(Session(session.family, session.fingerprint, layers(4), calls=4, images=3))
    session.remember()
    assert [(p.calls, p.images) for p in session.history] == [(8, 1), (12, 4)]
    assert session.history[-1].level.tolist() == [0.25, 0.5]


def test_merging_takes_the_points_of_both_in_order_and_no_sum_changes(session):
    other = Session(session.family, session.fingerprint, layers(4), calls=4, images=1)
    plain = Session(session.family, session.fingerprint, layers(8), calls=8, images=1)
    plain.merge(other)
    session.history, other.history = (at(3), at(8)), (at(2), at(4))
    session.merge(other)
    assert calls_of(session.history) == [2, 3, 4, 8]
    assert calls_of(other.history) == [2, 4]
    for name, found in session.layers.items():
        assert found.out_sq_sum == plain.layers[name].out_sq_sum
        assert torch.equal(found.abs_sum, plain.layers[name].abs_sum)


def test_merging_two_long_histories_stays_bounded(session):
    other = Session(session.family, session.fingerprint, layers(4), calls=99, images=1)
    session.history = tuple(at(calls) for calls in range(1, 2 * MAX_POINTS, 2))
    other.history = tuple(at(calls) for calls in range(2, 2 * MAX_POINTS + 1, 2))
    session.merge(other)
    assert len(session.history) == MAX_POINTS
    assert calls_of(session.history)[0] == 1
    assert calls_of(session.history)[-1] == 2 * MAX_POINTS


def saved(session: Session, path: Path) -> dict[str, Any]:
    save_session(session, path)
    return torch.load(path, weights_only=True)


def test_a_saved_history_loads_bit_for_bit(session, tmp_path):
    session.remember()
    session.merge(Session(session.family, session.fingerprint, layers(4), calls=4, images=3))
    with torch.inference_mode():  # as nodes do
        session.remember()
    data = saved(session, tmp_path / "s.pt")
    assert data["version"] == 1
    assert {key: tuple(value.shape) for key, value in data["meta"]["history"].items()} == {
        "calls": (2,),
        "images": (2,),
        "sensitivity": (2, 2),
        "level": (2, 2),
    }
    loaded = load_session(tmp_path / "s.pt").history
    assert [(p.calls, p.images) for p in loaded] == [(8, 1), (12, 4)]
    for ours, theirs in zip(loaded, session.history, strict=True):
        assert torch.equal(ours.sensitivity, theirs.sensitivity)
        assert torch.equal(ours.level, theirs.level)


def test_a_session_without_history_is_saved_without_and_loads(session, tmp_path):
    """As every file was before there was a history."""
    assert "history" not in saved(session, tmp_path / "s.pt")["meta"]
    loaded = load_session(tmp_path / "s.pt")
    assert loaded.history == ()
    loaded.remember()
    assert calls_of(loaded.history) == [8]


def tensors(**changes: object) -> dict[str, Any]:
    good = {
        "calls": torch.tensor([4, 8]),
        "images": torch.tensor([0, 1]),
        "sensitivity": torch.ones(2, 2),
        "level": torch.ones(2, 2),
    }
    return {**good, **changes}


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in tensors().items() if name != key}


MANY = MAX_POINTS + 1
DAMAGED = {
    "a list": [1, 2],
    "nothing in it": {},
    "no calls": without("calls"),
    "no level": without("level"),
    "no points": tensors(
        calls=torch.tensor([], dtype=torch.int64),
        images=torch.tensor([], dtype=torch.int64),
        sensitivity=torch.ones(0, 2),
        level=torch.ones(0, 2),
    ),
    "too many points": tensors(
        calls=torch.full((MANY,), 8),
        images=torch.zeros(MANY, dtype=torch.int64),
        sensitivity=torch.ones(MANY, 2),
        level=torch.ones(MANY, 2),
    ),
    "a layer less": tensors(level=torch.ones(2, 1)),
    "a point less": tensors(sensitivity=torch.ones(1, 2)),
    "lists for vectors": tensors(calls=[4, 8]),
    "a number for a vector": tensors(calls=torch.tensor(4)),
    "calls of another type": tensors(calls=torch.tensor([4.0, 8.0])),
    "levels of another type": tensors(level=torch.ones(2, 2, dtype=torch.float64)),
    "a sparse matrix": tensors(level=torch.ones(2, 2).to_sparse()),
    "NaN": tensors(sensitivity=torch.tensor([[1.0, math.nan], [1.0, 1.0]])),
    "infinity": tensors(level=torch.tensor([[1.0, math.inf], [1.0, 1.0]])),
    "a negative level": tensors(level=torch.tensor([[1.0, -1.0], [1.0, 1.0]])),
    "calls out of order": tensors(calls=torch.tensor([8, 4])),
    "no call at a point": tensors(calls=torch.tensor([0, 8])),
    "more calls than the session has": tensors(calls=torch.tensor([4, 9])),
    "negative images": tensors(images=torch.tensor([-1, 1])),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_history_is_refused_by_the_name_of_its_file(damage, session, tmp_path):
    data = saved(session, tmp_path / "mine.pt")
    data["meta"]["history"] = DAMAGED[damage]
    torch.save(data, tmp_path / "mine.pt")
    with pytest.raises(SessionError, match=r"mine\.pt"):
        load_session(tmp_path / "mine.pt")


def test_the_undamaged_history_loads(session, tmp_path):
    data = saved(session, tmp_path / "mine.pt")
    data["meta"]["history"] = tensors()
    torch.save(data, tmp_path / "mine.pt")
    assert calls_of(load_session(tmp_path / "mine.pt").history) == [4, 8]
