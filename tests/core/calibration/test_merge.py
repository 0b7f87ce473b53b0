from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hswq.hswq_core.calibration.merge import equal, merge_files, save_merged
from hswq.hswq_core.calibration.observer import LayerObserver, LayerStats
from hswq.hswq_core.calibration.session import Session, load_session, save_session
from hswq.hswq_core.calibration.states import MOST_SMALL_STATES, Sample, State
from hswq.hswq_core.calibration.states_file import load_states, save_states, states_path
from hswq.hswq_core.errors import HSWQError, SessionError, SettingError
from hswq.hswq_core.model.fingerprint import Fingerprint, layout_hash

FINGERPRINT = Fingerprint(layout_hash({"fc": ("Linear", (6, 5))}), torch.linspace(1, 2, 4))


def recorded(calls: range, weights: float = 1.0) -> Session:
    """A session of the calls with these numbers; each call has activations of its own."""
    observer = LayerObserver("fc", "Linear", (6, 5), 5)
    for call in calls:
        g = torch.Generator().manual_seed(call)
        observer.see_input(torch.randn(7, 5, generator=g))
        observer.see_output(torch.randn(7, 6, generator=g) + call)
    fingerprint = Fingerprint(FINGERPRINT.layout, FINGERPRINT.weights * weights)
    layers: dict[str, LayerStats] = {"fc": observer.drain()}
    return Session("Flux", fingerprint, layers, len(calls), 1, {20: 1}, 100.0 + calls.start, 200.0 + calls.stop)


def save(folder: Path, name: str, calls: range, keys: list[float] | None = None, **more: float) -> Path:
    path = folder / f"{name}.pt"
    save_session(recorded(calls, **more), path)
    if keys is not None:
        sample = Sample(len(keys))
        sample.add([State(key, {"x": torch.full((1, 4), key), "sigma": torch.ones(1)}, {}) for key in keys])
        save_states(sample, FINGERPRINT, states_path(path))
    return path


def merged_keys(folder: Path, *paths: Path) -> list[float]:
    save_merged(merge_files(paths), folder / "sum.pt")
    return [state.key for state in load_states(states_path(folder / "sum.pt"), FINGERPRINT, 1000).states]


def test_two_halves_are_the_whole(tmp_path):
    halves = [save(tmp_path, "a", range(4)), save(tmp_path, "b", range(4, 9))]
    save_merged(merge_files(halves), tmp_path / "sum.pt")
    found, whole = load_session(tmp_path / "sum.pt"), recorded(range(9))
    assert (found.calls, found.images, found.steps) == (9, 2, {20: 2})
    assert (found.created, found.updated) == (100.0, 209.0)
    a, b = found.layers["fc"], whole.layers["fc"]
    assert (a.in_calls, a.out_calls, a.input_amax) == (b.in_calls, b.out_calls, b.input_amax)
    assert torch.allclose(a.abs_sum, b.abs_sum, rtol=1e-12, atol=0)
    assert torch.allclose(a.mean_sum, b.mean_sum, rtol=1e-9)
    assert a.sensitivity == pytest.approx(b.sensitivity, rel=1e-12)
    assert not states_path(tmp_path / "sum.pt").exists()  # none of them has any


def test_the_order_does_not_matter_bit_by_bit(tmp_path):
    paths = [save(tmp_path, name, range(5 * i, 5 * i + 5)) for i, name in enumerate("abcd")]
    forward, backward = merge_files(paths), merge_files(paths[::-1])
    assert equal(forward.session, backward.session)
    assert not equal(forward.session, merge_files(paths[:3]).session)


def test_recorded_calls_that_are_all_there_are_all_kept(tmp_path):
    keys = [[0.1, 0.5], [0.2, 0.9, 0.95]]
    paths = [save(tmp_path, "a", range(2), keys[0]), save(tmp_path, "b", range(2, 5), keys[1])]
    assert merged_keys(tmp_path, *paths) == [0.1, 0.2, 0.5, 0.9, 0.95]


def test_a_sample_of_recorded_calls_stays_one(tmp_path):
    """Two of ten calls and two of ten: of all twenty, those two of the smallest keys are a uniform sample."""
    paths = [save(tmp_path, "a", range(10), [0.1, 0.15]), save(tmp_path, "b", range(10, 20), [0.12, 0.3])]
    assert merged_keys(tmp_path, *paths) == [0.1, 0.12]


def test_never_more_recorded_calls_than_a_calibration_would_keep(tmp_path):
    many = [
        save(tmp_path, n, range(at, at + 300), [(at + i) / 700 for i in range(300)]) for n, at in (("a", 0), ("b", 400))
    ]
    assert len(merged_keys(tmp_path, *many)) == MOST_SMALL_STATES


def test_a_session_without_recorded_calls_adds_its_statistics(tmp_path):
    paths = [save(tmp_path, "a", range(2), [0.1, 0.5]), save(tmp_path, "b", range(2, 4))]
    merged = merge_files(paths)
    assert merged.report("sum").splitlines() == [
        "sum: Flux, 1 layers, 4 calls, 2 images, 2 recorded calls. The sum of:",
        "  a: 2 calls (2 recorded), 1 images",
        "  b: 2 calls (none recorded), 1 images",
    ]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda f: [save(f, "a", range(2))], "got 1, expected two or more"),
        (lambda f: [save(f, "a", range(2)), f / "missing.pt"], "missing.pt: got no such file"),
        (
            lambda f: [save(f, "a", range(2)), save(f, "b", range(2, 4), weights=1.1)],
            "b: got another model than that of a",
        ),
        (lambda f: [save(f, "a", range(2))] * 2, "a: got recordings that a has too"),
        (lambda f: [save(f, "a", range(2)), save(f, "copy", range(2))], "copy: got recordings that a has too"),
    ],
)
def test_what_cannot_be_merged_is_refused(tmp_path, make, words):
    with pytest.raises(HSWQError, match=words):
        merge_files(make(tmp_path))


@pytest.mark.parametrize("kind", [".pt", ".states.safetensors"])
def test_nothing_is_written_over(tmp_path, kind):
    merged = merge_files([save(tmp_path, "a", range(2), [0.1]), save(tmp_path, "b", range(2, 4))])
    (tmp_path / f"sum_02{kind}").write_bytes(b"mine")
    (tmp_path / "sum.pt").touch()
    with pytest.raises(SettingError, match=r"Session sum: .* for example sum_03\."):
        save_merged(merged, tmp_path / "sum.pt")
    (tmp_path / "sum.pt").unlink()
    with pytest.raises(SettingError, match="for example sum_03"):
        save_merged(merged, tmp_path / "sum_02.pt")
    assert (tmp_path / f"sum_02{kind}").read_bytes() == b"mine"


def test_both_files_or_none(tmp_path, monkeypatch):
    merged = merge_files([save(tmp_path, "a", range(2), [0.1]), save(tmp_path, "b", range(2, 4))])
    before = sorted(tmp_path.iterdir())
    merged.session.steps = {20: lambda: None}  # which no session's reader would take, nor its writer
    with pytest.raises((AttributeError, TypeError, RuntimeError, SessionError)):
        save_merged(merged, tmp_path / "sum.pt")
    assert sorted(tmp_path.iterdir()) == before
