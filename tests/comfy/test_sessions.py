"""Merging sessions with the node, and listing them for the page, in the real server."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hswq.hswq_core.calibration.session import load_session
from hswq.hswq_core.calibration.states_file import load_states, states_path
from rig import flow, prompts
from rig.client import ClientError, Prompt, Result

pytestmark = pytest.mark.comfy


@pytest.fixture(scope="module")
def folder(server) -> Path:
    return server.output / "hswq_stats"


def draw(server, models, session: str, seed: int, **settings: Any) -> Prompt:
    plain = prompts.flux(models.flux(), models.taef(), seed=seed)
    calibration = prompts.node(
        "HSWQCalibration", model=["model", 0], session=session, save_every=50, measure_every=1, **settings
    )
    prompt = prompts.insert(plain, "calibration", calibration)
    server.client.run(prompt).check()
    return prompt


@pytest.fixture(scope="module")
def halves(server, models) -> tuple[str, str]:
    """Two sessions of two calls each; "half_all" has recorded the pictures of both."""
    for seed, name in enumerate(("half_a", "half_b"), 41):
        draw(server, models, name, seed)
        draw(server, models, "half_all", seed)
    return "half_a", "half_b"


def merge(server, sessions: str, name: str) -> Result:
    prompt = {
        "merge": prompts.node("HSWQMergeSessions", sessions=sessions, name=name),
        "show": prompts.node("PreviewAny", source=["merge", 1]),
    }
    return server.client.run(prompt)


def rows(server, name: str = "") -> dict[str, dict[str, Any]]:
    found = server.client.get(f"/hswq/sessions?name={name}")["sessions"]
    assert len({row["name"] for row in found}) == len(found)
    return {row["name"]: row for row in found}


@pytest.mark.compat
def test_two_half_sessions_are_one_whole(server, halves, folder):
    report = merge(server, "half_a\nhalf_b\n", "half_sum").check().text()[-1]
    assert "half_sum: Flux, 26 layers, 4 calls, 2 images, 4 recorded calls" in report
    assert "half_a: 2 calls (2 recorded), 1 images" in report
    found, whole = load_session(folder / "half_sum.pt"), load_session(folder / "half_all.pt")
    assert (found.calls, found.images, found.steps) == (whole.calls, whole.images, whole.steps) == (4, 2, {2: 2})
    for name, stats in whole.layers.items():
        assert torch.equal(found.layers[name].abs_sum, stats.abs_sum)  # a sum of two terms is exact
        assert torch.equal(found.layers[name].mean_sum, stats.mean_sum)
        assert (found.layers[name].out_sum, found.layers[name].out_sq_sum) == (stats.out_sum, stats.out_sq_sum)
        assert (found.layers[name].in_calls, found.layers[name].input_amax) == (stats.in_calls, stats.input_amax)
    kept = [load_states(states_path(folder / f"{n}.pt"), whole.fingerprint, 100) for n in ("half_sum", "half_all")]
    marks = [{state.mark for state in sample.states} for sample in kept]
    assert marks[0] == marks[1]
    assert len(marks[0]) == 4


def test_the_order_of_names_and_a_second_run_change_nothing(server, halves, folder):
    merge(server, "half_a\nhalf_b", "half_again").check()
    before = {path: path.read_bytes() for path in folder.glob("half_again*")}
    assert "was there already" in merge(server, "half_b, half_a", "half_again").check().text()[-1]
    assert {path: path.read_bytes() for path in folder.glob("half_again*")} == before
    merge(server, "half_b,half_a", "half_turned").check()
    a, b = (load_session(folder / f"half_{name}.pt") for name in ("again", "turned"))
    assert all(torch.equal(a.layers[name].abs_sum, b.layers[name].abs_sum) for name in a.layers)


@pytest.mark.compat
def test_the_converter_takes_the_merged_session_through_its_link(server, models, halves):
    convert = {
        "merge": prompts.node("HSWQMergeSessions", sessions="half_a\nhalf_b", name="half_linked"),
        "model": prompts.node("UNETLoader", unet_name=models.flux(), weight_dtype="default"),
        "convert": prompts.node(
            "HSWQConverter",
            model=["model", 0],
            session=["merge", 0],
            format="comfy",
            method="hswq",
            extra_percent=3.0,
            keep_ratio=0.25,
            filename_prefix="linked",
        ),
        "show": prompts.node("PreviewAny", source=["convert", 1]),
    }
    report = server.client.run(convert).check().text()[-1]
    assert "26 layers" in report
    assert list((server.output / "diffusion_models").glob("linked_flux-tiny_hswq_r4_0.25_comfy*"))


@pytest.mark.parametrize(
    ("sessions", "name", "words"),
    [
        ("half_a", "bad", "got 1 names, expected two or more"),
        ("", "bad", "got 0 names"),
        ("half_a\nhalf_b\nhalf_a", "bad", "got half_a twice"),
        ("half_a\n../half_b", "bad", "Session name: got '../half_b'"),
        ("half_a\nhalf_b", "../bad", "Session name: got '../bad'"),
        ("half_a\nhalf_b", "", "Session name: got ''"),
        ("half_a\nnever_made", "bad", "Session file never_made.pt: got no such file"),
        ("half_a\nhalf_sd15", "bad", "Session half_sd15: got another model than that of half_a"),
        ("half_a\nhalf_copy", "bad", "Session half_copy: got recordings that half_a has too"),
        ("half_a\nhalf_broken", "bad", "Session file half_broken.pt: got an unreadable file"),
        ("half_a\nhalf_lost", "bad", "States half_lost.states.safetensors: got an unreadable file"),
        ("half_a\nhalf_b", "half_all", "Choose another name, for example half_all_02."),
        ("half_a\nhalf_b", "half_b", "Choose another name, for example half_b_02."),
    ],
)
def test_bad_input_is_refused_by_name_and_nothing_is_written(server, halves, folder, sessions, name, words):
    _spoil(server, folder)
    before = {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"}
    outside = sorted(server.output.iterdir())
    result = merge(server, sessions, name)
    assert result.status in ("rejected", "error")
    assert words in " ".join(result.errors)
    after = {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"}
    assert after == before
    assert sorted(server.output.iterdir()) == outside


def _spoil(server, folder: Path) -> None:
    """Sessions that cannot be merged with half_a."""
    if (folder / "half_broken.pt").exists():
        return
    server.client.run(flow.calibration(flow.prepare(server, "sd15", flow.CALIBRATE, session="half_sd15"))).check()
    shutil.copy(folder / "half_a.pt", folder / "half_copy.pt")
    shutil.copy(folder / "half_b.pt", folder / "half_lost.pt")
    states_path(folder / "half_lost.pt").write_bytes(b"no states")
    (folder / "half_broken.pt").write_bytes((folder / "half_b.pt").read_bytes()[:2000])


@pytest.mark.compat
def test_the_list_says_what_is_in_each_session(server, halves, folder):
    _spoil(server, folder)
    found, session = rows(server), load_session(folder / "half_a.pt")
    assert found["half_a"] == {
        "name": "half_a",
        "problem": None,
        "family": "Flux",
        "model": session.fingerprint.layout,
        "layers": 26,
        "calls": 2,
        "images": 1,
        "states": 2,
        "updated": session.updated,
    }
    assert found["half_sd15"]["family"] == "SD1.5"
    assert found["half_sd15"]["model"] != found["half_a"]["model"]
    assert found["half_broken"] == {"name": "half_broken", "problem": "unreadable"}
    assert found["half_lost"]["states"] is None
    assert found["half_copy"]["states"] is None  # it has none
    assert list(found.values())[-1]["problem"] is not None  # unusable sessions come last
    assert str(folder) not in json.dumps(found)
    assert str(server.base) not in json.dumps(server.client.get("/hswq/sessions"))


def test_the_list_follows_what_is_on_disk(server, models, folder):
    prompt = draw(server, models, "half_grows", 51)
    before = rows(server)["half_grows"]
    prompt["sampler"]["inputs"]["seed"] += 1
    server.client.run(prompt).check()
    after = rows(server)["half_grows"]
    assert (before["calls"], before["states"]) == (2, 2)
    assert (after["calls"], after["states"]) == (4, 4)
    assert after["updated"] > before["updated"]
    states_path(folder / "half_grows.pt").unlink()
    assert rows(server)["half_grows"]["states"] is None
    (folder / "half_grows.pt").unlink()
    assert "half_grows" not in rows(server)


def test_damaged_files_are_listed_and_break_nothing(server, halves, folder):
    whole = (folder / "half_a.pt").read_bytes()
    odd = load_session(folder / "half_a.pt")
    data = torch.load(folder / "half_a.pt", weights_only=True)
    damaged = {"cut": whole[: len(whole) // 2], "empty": b"", "text": b"hello"}
    for name, content in damaged.items():
        (folder / f"odd_{name}.pt").write_bytes(content)
    torch.save([1, 2], folder / "odd_list.pt")
    torch.save({**data, "meta": {**data["meta"], "updated": float("nan")}}, folder / "odd_nan.pt")
    torch.save({**data, "meta": {**data["meta"], "calls": 10**5000}}, folder / "odd_huge.pt")
    (folder / "odd_folder.pt").mkdir()
    names = {"odd_cut", "odd_empty", "odd_text", "odd_list", "odd_nan", "odd_huge", "odd_folder"}
    try:
        found = rows(server)
        assert {name for name, row in found.items() if row["problem"] == "unreadable"} >= names
        assert found["half_a"]["calls"] == odd.calls
    finally:
        for name in names - {"odd_folder"}:
            (folder / f"{name}.pt").unlink()
        (folder / "odd_folder.pt").rmdir()


def test_a_session_that_has_not_changed_is_not_read_again(comfy, server, halves, folder, tmp_path):
    import folder_paths
    from hswq.loader.sessions import listing

    before = folder_paths.get_output_directory()
    folder_paths.set_output_directory(str(tmp_path))
    try:
        assert listing.saved_sessions() == []  # there is not even a folder
        shutil.copytree(
            folder, tmp_path / "hswq_stats", ignore=lambda _, names: [n for n in names if "half_a" not in n]
        )
        first, read = listing.saved_sessions(), listing._read.cache_info().misses
        assert len(first) > 1
        assert listing.saved_sessions() == first
        assert listing._read.cache_info().misses == read
        (tmp_path / "hswq_stats" / "half_a.pt").touch()
        listing.saved_sessions()
        assert listing._read.cache_info().misses == read + 1
    finally:
        folder_paths.set_output_directory(before)


@pytest.mark.skipif(os.name == "nt", reason="no such file names")
def test_a_name_that_no_session_may_have_is_listed_as_such(server, folder):
    folder.mkdir(exist_ok=True)
    for name in ("<b>", "a\udcffb", "x" * 150):
        (folder / f"{name}.pt").touch()
    try:
        found = rows(server)
        assert {found[name]["problem"] for name in ("<b>", "a\udcffb", "x" * 150)} == {"its name cannot be used"}
    finally:
        for name in ("<b>", "a\udcffb", "x" * 150):
            (folder / f"{name}.pt").unlink()


@pytest.mark.parametrize(
    ("name", "free"),
    [("half_a", "half_a_02"), ("session_41", "session_42"), ("..%2Fevil", "session_02"), ("", "session_02")],
)
def test_the_list_names_a_free_session(server, halves, name, free):
    assert server.client.get(f"/hswq/sessions?name={name}")["next"] == free


@pytest.mark.compat
def test_the_route_only_answers(server):
    """The route is read-only."""
    code, _ = server.client._call("/hswq/sessions", {"name": "x"})  # a POST
    assert code == 405
    with pytest.raises(ClientError, match="404"):
        server.client.get("/hswq/sessions/../sessions/x")


def test_a_link_out_of_the_folder_is_not_read(server, halves, folder, tmp_path):
    shutil.copy(next(folder.glob("*.pt")), tmp_path / "elsewhere.pt")
    link = folder / "led_out.pt"
    link.symlink_to(tmp_path / "elsewhere.pt")
    rows = {row["name"]: row["problem"] for row in server.client.get("/hswq/sessions")["sessions"]}
    link.unlink()
    assert rows["led_out"] == "its name cannot be used"


def test_a_session_of_the_port_that_came_before_is_listed(server, folder):
    folder.mkdir(exist_ok=True)
    torch.save({"meta": {"type": "hswq_dual_monitor_v2"}, "layers": {"a": {}, "b": {}}}, folder / "old_port.pt")
    try:
        row = rows(server)["old_port"]
        assert (row["family"], row["layers"], row["problem"]) == ("HSWQ port", 2, None)
        assert "old_port" in " ".join(merge(server, "old_port\nhalf_a", "bad").errors)
    finally:
        (folder / "old_port.pt").unlink()
