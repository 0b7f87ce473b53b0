from __future__ import annotations

import contextlib
import copy
import math
import pickle
import random
import re
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hswq.hswq_core.calibration.observer import LayerObserver, LayerStats
from hswq.hswq_core.calibration.session import Session, load_session, save_session
from hswq.hswq_core.errors import FileError, SessionError
from hswq.hswq_core.model.fingerprint import Fingerprint, layout_hash, sample_weights

pytestmark = [  # of torch, about the files that are damaged on purpose
    pytest.mark.filterwarnings("ignore:Detected pickle protocol"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks"),
]

SHAPES = {"fc": ("Linear", (6, 5), 5), "conv": ("Conv2d", (6, 4, 3, 3), 8)}  # a convolution of two groups


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=g) for name, (_, shape, _) in SHAPES.items()}


def empty_session(model: dict[str, torch.Tensor] | None = None) -> Session:
    model = model or weights()
    layout = layout_hash({name: (kind, shape) for name, (kind, shape, _) in SHAPES.items()})
    layers = {name: LayerStats.empty(*row) for name, row in SHAPES.items()}
    return Session("SDXL", Fingerprint(layout, sample_weights(model, lambda name: model[name])), layers)


def recorded(calls: range, model: dict[str, torch.Tensor] | None = None) -> Session:
    """A session of the calls with these numbers; each call has activations of its own."""
    made = empty_session(model)
    observers = {name: LayerObserver(name, *row) for name, row in SHAPES.items()}
    for call in calls:
        g = torch.Generator().manual_seed(call)
        observers["fc"].see_input(torch.randn(7, 5, generator=g))
        observers["fc"].see_output(torch.randn(7, 6, generator=g) + call)
        observers["conv"].see_input(torch.randn(1, 8, 4, 4, generator=g))
        observers["conv"].see_output(torch.randn(1, 6, 4, 4, generator=g))
    for name, observer in observers.items():
        made.layers[name].merge(observer.drain())
    made.calls, made.images, made.steps = len(calls), len(calls) // 2, {20: 1, len(calls): 2}
    return made


def assert_same(a: Session, b: Session, relative: float = 0.0) -> None:
    assert (a.family, a.calls, a.images, a.steps) == (b.family, b.calls, b.images, b.steps)
    assert a.fingerprint.layout == b.fingerprint.layout
    assert torch.equal(a.fingerprint.weights, b.fingerprint.weights)
    assert list(a.layers) == list(b.layers)
    for name, x in a.layers.items():
        y = b.layers[name]
        assert (x.kind, x.shape, x.in_calls, x.out_calls) == (y.kind, y.shape, y.in_calls, y.out_calls)
        assert x.input_amax == y.input_amax
        assert x.out_sum == pytest.approx(y.out_sum, rel=relative, abs=0)
        assert x.out_sq_sum == pytest.approx(y.out_sq_sum, rel=relative, abs=0)
        torch.testing.assert_close(x.abs_sum, y.abs_sum, rtol=relative, atol=0)
        torch.testing.assert_close(x.mean_sum, y.mean_sum, rtol=relative, atol=relative)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Saving and loading


def test_a_saved_session_loads_bit_for_bit(tmp_path):
    saved = recorded(range(10))
    save_session(saved, tmp_path / "s.pt")
    loaded = load_session(tmp_path / "s.pt")
    assert_same(loaded, saved)
    assert (loaded.created, loaded.updated) == (saved.created, saved.updated)
    assert loaded.layers["fc"].abs_sum.dtype == torch.float64
    assert names(tmp_path) == ["s.pt"]


def test_the_file_holds_plain_containers_only(tmp_path):
    save_session(recorded(range(3)), tmp_path / "s.pt")
    data = torch.load(tmp_path / "s.pt", weights_only=True)
    assert sorted(data) == ["layers", "meta", "type", "version"]
    assert (data["type"], data["version"]) == ("hswq_session", 1)
    assert data["layers"]["fc"]["shape"] == [6, 5]


def test_a_session_recorded_in_inference_mode_can_be_saved_loaded_and_merged(tmp_path):
    with torch.inference_mode():
        first = recorded(range(4))
        save_session(first, tmp_path / "s.pt")
    loaded = load_session(tmp_path / "s.pt")
    loaded.merge(recorded(range(4, 10)))
    first.merge(recorded(range(4, 10)))
    assert_same(loaded, first)


def test_saving_leaves_the_session_usable(tmp_path):
    made = recorded(range(4))
    before = copy.deepcopy(made)
    save_session(made, tmp_path / "s.pt")
    assert_same(made, before)


def test_a_session_survives_saving_between_calls(tmp_path):
    """Restarts: load, merge, save, three times, equal one run."""
    path = tmp_path / "s.pt"
    save_session(recorded(range(3)), path)
    for part in (range(3, 4), range(4, 9), range(9, 10)):
        whole = load_session(path)
        whole.merge(recorded(part))
        save_session(whole, path)
    expected, found = recorded(range(10)), load_session(path)
    expected.images, expected.steps = found.images, found.steps
    assert_same(found, expected, relative=1e-12)


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_save_leaves_the_old_file_and_no_temporary_one(failure, tmp_path, monkeypatch):
    path = tmp_path / "s.pt"
    save_session(recorded(range(3)), path)
    old = path.read_bytes()

    def half(file: Path, _data: object) -> None:
        with file.open("wb") as opened:
            opened.write(b"half")
        raise failure

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(failure):
        save_session(recorded(range(8)), path)
    assert path.read_bytes() == old
    assert names(tmp_path) == ["s.pt"]


def test_a_folder_that_cannot_be_written_to_is_a_file_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FileError, match=r"s\.pt"):
        save_session(recorded(range(3)), tmp_path / "file" / "s.pt")


# Merging


def test_two_half_sessions_are_one_whole():
    whole, half, other = recorded(range(10)), recorded(range(6)), recorded(range(6, 10))
    half.merge(other)
    assert (half.calls, half.images, half.steps) == (10, 5, {20: 2, 6: 2, 4: 2})
    whole.steps = half.steps
    assert_same(half, whole, relative=1e-12)
    for name, stats in whole.layers.items():
        assert half.layers[name].sensitivity == pytest.approx(stats.sensitivity, rel=1e-12)


def test_merging_does_not_depend_on_the_order():
    a, b = recorded(range(6)), recorded(range(6, 10))
    a.merge(recorded(range(6, 10)))
    b.merge(recorded(range(6)))
    assert_same(a, b, relative=1e-12)


def test_merging_leaves_the_other_session_alone():
    a, b = empty_session(), recorded(range(4))
    before = copy.deepcopy(b)
    a.merge(b)
    a.merge(b)
    assert_same(b, before)


def test_merging_an_empty_part_changes_nothing():
    a, before = recorded(range(4)), recorded(range(4))
    a.merge(empty_session())
    assert_same(a, before)


def test_times_span_both_parts():
    a, b = recorded(range(2)), recorded(range(2))
    a.created, a.updated, b.created, b.updated = 5.0, 6.0, 3.0, 9.0
    c = copy.deepcopy(b)
    b.merge(a)
    assert (b.created, b.updated) == (3.0, 9.0)
    a.merge(c)
    assert (a.created, a.updated) == (3.0, 9.0)


def test_a_session_of_another_layout_is_refused_and_nothing_changes():
    a, b, before = recorded(range(4)), recorded(range(4)), recorded(range(4))
    b.fingerprint = Fingerprint(layout_hash({"fc": ("Linear", (6, 5))}), b.fingerprint.weights)
    with pytest.raises(SessionError, match="another layer layout"):
        a.merge(b)
    assert_same(a, before)


def test_a_session_of_other_weights_is_refused_and_nothing_changes():
    a, before = recorded(range(4)), recorded(range(4))
    with pytest.raises(SessionError, match="other weights"):
        a.merge(recorded(range(4), weights(seed=1)))
    assert_same(a, before)


def test_a_session_of_the_same_weights_in_bfloat16_is_accepted():
    rounded = {name: w.bfloat16() for name, w in weights().items()}
    a = recorded(range(4))
    a.merge(recorded(range(4), rounded))
    assert a.calls == 8


# Damage


def record() -> dict[str, Any]:
    """What a session's file holds."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "s.pt"
        save_session(recorded(range(4)), path)
        return torch.load(path, weights_only=True)


def in_layer(**changes: object) -> dict[str, Any]:
    data = record()
    data["layers"]["fc"].update(changes)
    return data


def in_meta(**changes: object) -> dict[str, Any]:
    data = record()
    data["meta"].update(changes)
    return data


def without(*path: str) -> dict[str, Any]:
    data = inner = record()
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return data


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


DAMAGED = {
    "a list": [1, 2],
    "a tensor": torch.ones(3),
    "an empty dict": {},
    "another type": {**record(), "type": "lora"},
    "a newer version": {**record(), "version": 2},
    "no version": without("version"),
    "no layers": {**record(), "layers": {}},
    "layers of another type": {**record(), "layers": [1]},
    "layer of another type": {**record(), "layers": {"fc": 3}},
    "meta of another type": {**record(), "meta": 3},
    "NaN in the importance": in_layer(abs_sum=vector(1, 2, math.nan, 4, 5)),
    "infinite mean": in_layer(mean_sum=vector(1, 2, math.inf, 4, 5)),
    "NaN output sum": in_layer(out_sum=math.nan),
    "infinite output squares": in_layer(out_sq_sum=math.inf),
    "NaN maximum": in_layer(input_amax=math.nan),
    "negative importance": in_layer(abs_sum=vector(1, 2, -3, 4, 5)),
    "negative output squares": in_layer(out_sq_sum=-1.0),
    "negative maximum": in_layer(input_amax=-1.0),
    "negative input calls": in_layer(in_calls=-1),
    "negative output calls": in_layer(out_calls=-1),
    "endless calls": in_layer(in_calls=math.inf),
    "calls in words": in_layer(in_calls="four"),
    "importance too short": in_layer(abs_sum=vector(1, 2, 3, 4)),
    "both vectors too short": in_layer(abs_sum=vector(1, 2, 3, 4), mean_sum=vector(1, 2, 3, 4)),
    "both vectors twice as long": in_layer(abs_sum=vector(*range(10)), mean_sum=vector(*range(10))),
    "no values": in_layer(abs_sum=vector(), mean_sum=vector()),
    "a matrix": in_layer(abs_sum=vector(1, 2, 3, 4, 5).reshape(1, 5)),
    "a sparse vector": in_layer(abs_sum=vector(1, 2, 3, 4, 5).to_sparse()),
    "a list for a vector": in_layer(abs_sum=[1.0] * 5),
    "another kind": in_layer(kind="Conv3d"),
    "another rank": in_layer(shape=[6, 5, 1]),
    "another shape": in_layer(shape=[7, 5]),
    "shape of zero": in_layer(shape=[6, 0]),
    "shape of no numbers": in_layer(shape=["a", "b"]),
    "no kind": without("layers", "fc", "kind"),
    "no sums": without("layers", "fc", "abs_sum"),
    "a layer missing": without("layers", "conv"),
    "a layer too many": {**record(), "layers": {**record()["layers"], "other": record()["layers"]["fc"]}},
    "another layout": in_meta(layout="0" * 64),
    "no layout": without("meta", "layout"),
    "no weights": without("meta", "weights"),
    "NaN weights": in_meta(weights=torch.full((8,), math.nan)),
    "weights of another length": in_meta(weights=torch.ones(7)),
    "negative calls": in_meta(calls=-1),
    "negative images": in_meta(images=-1),
    "negative runs": in_meta(steps={20: -1}),
    "negative steps": in_meta(steps={-20: 1}),
    "steps of another type": in_meta(steps=[20]),
    "no time": without("meta", "created"),
    "time in words": in_meta(updated="noon"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_session_is_refused_by_name(damage, tmp_path):
    path = tmp_path / "mine.pt"
    torch.save(DAMAGED[damage], path)
    with pytest.raises(SessionError, match=r"mine\.pt"):
        load_session(path)


def test_the_undamaged_record_loads(tmp_path):
    """The damage above is what makes those files unreadable, not the way the tests save them."""
    torch.save(record(), tmp_path / "mine.pt")
    assert_same(load_session(tmp_path / "mine.pt"), recorded(range(4)))


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path):
    path = tmp_path / "mine.pt"
    save_session(recorded(range(3)), path)
    whole = path.read_bytes()
    for length in {*range(0, len(whole), max(1, len(whole) // 50)), 1, 4, len(whole) - 1}:
        path.write_bytes(whole[:length])
        with pytest.raises(SessionError, match=r"mine\.pt"):
            load_session(path)


def load_or_refuse(path: Path) -> Session | None:
    """The session, or None if it was refused by name; any other error fails the test."""
    with contextlib.suppress(SessionError):
        return load_session(path)
    with pytest.raises(SessionError, match=re.escape(path.name)):
        load_session(path)
    return None


def test_random_damage_is_refused_or_harmless_but_never_another_error(tmp_path):
    path, rng = tmp_path / "mine.pt", random.Random(0)
    save_session(recorded(range(3)), path)
    whole, refused = path.read_bytes(), 0
    for _ in range(200):
        damaged = bytearray(whole)
        for _ in range(rng.choice((1, 10, 300))):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged)
        loaded = load_or_refuse(path)
        refused += loaded is None
        assert loaded is None or all(stats.is_finite() for stats in loaded.layers.values())
    assert refused > 100


def test_garbage_in_the_pickle_is_refused_or_harmless_but_never_another_error(tmp_path):
    """The archive is whole, its pickle is not."""
    path, rng = tmp_path / "mine.pt", random.Random(0)
    save_session(recorded(range(3)), path)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    (key,) = [name for name in parts if name.endswith("data.pkl")]
    refused = 0
    for _ in range(400):
        damaged = bytearray(parts[key])
        for _ in range(rng.choice((1, 3))):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in {**parts, key: bytes(damaged)}.items():
                archive.writestr(name, content)
        refused += load_or_refuse(path) is None
    assert refused > 100


class Attack:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (self.folder,)


def test_a_pickle_that_would_execute_code_is_refused_unexecuted(tmp_path):
    path, victim = tmp_path / "mine.pt", tmp_path / "executed"
    pickle.loads(pickle.dumps(Attack(victim)))  # noqa: S301 - shows that the attack works where pickles are trusted
    victim.rmdir()
    torch.save({**record(), "extra": Attack(victim)}, path)
    with pytest.raises(SessionError, match=r"mine\.pt"):
        load_session(path)
    path.write_bytes(pickle.dumps(Attack(victim)))
    with pytest.raises(SessionError, match=r"mine\.pt"):
        load_session(path)
    assert names(tmp_path) == ["mine.pt"]


def test_a_missing_file_is_a_session_error_with_a_remedy(tmp_path):
    with pytest.raises(SessionError, match=r"mine\.pt.*no such file.*Calibration node"):
        load_session(tmp_path / "mine.pt")


def test_a_folder_is_no_session(tmp_path):
    (tmp_path / "mine.pt").mkdir()
    with pytest.raises(SessionError, match=r"mine\.pt"):
        load_session(tmp_path / "mine.pt")


# Use


def test_a_session_without_a_call_is_an_error_that_says_what_to_queue():
    with pytest.raises(SessionError, match=r"Session mine.*Calibration node"):
        empty_session().require_statistics("Session mine")
    recorded(range(1)).require_statistics("Session mine")


def test_summary():
    assert recorded(range(4)).summary() == "SDXL, 2 layers, 4 calls, 2 images"
