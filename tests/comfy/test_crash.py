"""Processes that are killed, hang, or work at the same time: no saved call is lost, no file is half-written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hswq.hswq_core.calibration.session import load_session
from hswq.hswq_core.calibration.states import MAX_STATES
from hswq.hswq_core.calibration.states_file import load_states, states_path
from rig import inprocess, pack, tiny
from rig.environment import child_environment
from rig.wait import until

pytestmark = [pytest.mark.comfy, pytest.mark.skipif(os.name == "nt", reason="no SIGKILL, no fork")]

BENCH = pack.ROOT / "bench"
STEPS, PICTURES = 4, 5
CALIBRATES = """
import sys, time
from pathlib import Path
import torch
from rig import inprocess, pack, tiny
pack.alias()
inprocess.load_comfy()
from hswq.loader.calibration.model import calibrated
path, first = Path(sys.argv[1]), int(sys.argv[2])
with torch.inference_mode():
    model = inprocess.load_model(tiny.make("flux-tiny"))
    watched = calibrated(model, path, 1, lambda _line: None)
    print("ready", flush=True)
    sys.stdin.readline()
    for seed in range(first, first + {pictures}):
        inprocess.sample(watched, steps={steps}, cfg=1.0, seed=seed, prompt=seed)
"""
HOLDS = """
import sys
from filelock import FileLock
with FileLock(sys.argv[1]):
    print("ready", flush=True)
    sys.stdin.readline()
"""


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Start a process that reports when it is ready and then waits for a line."""
    code = f"import sys; sys.path.insert(0, {str(BENCH)!r})\n{code}"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    process = subprocess.Popen(
        command, env=child_environment(1), stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True
    )
    until(lambda: "ready" in process.stdout.readline(), 240)
    return process


def draw(model, seed: int, steps: int = STEPS) -> torch.Tensor:
    return inprocess.sample(model, steps=steps, cfg=1.0, seed=seed, prompt=seed)


def flux(path: Path, save_every: int = 1):
    """(model, the same calibrated)."""
    from hswq.loader.calibration.model import calibrated

    model = inprocess.load_model(tiny.make("flux-tiny"))
    return model, calibrated(model, path, save_every, lambda _line: None)


def assert_same_sums(found, expected, times: int = 1) -> None:
    for name, stats in expected.layers.items():
        assert found.layers[name].in_calls == times * stats.in_calls
        assert found.layers[name].out_calls == times * stats.out_calls
        torch.testing.assert_close(found.layers[name].abs_sum, times * stats.abs_sum, rtol=1e-9, atol=0)
        assert found.layers[name].out_sq_sum == pytest.approx(times * stats.out_sq_sum, rel=1e-9)


@pytest.mark.parametrize(
    "work", ["calibrating", "converting, hswq", "converting, model_aware", "file to file, learned"]
)
def test_killed_at_any_moment(work):
    """A few kills; `bench/reliability.py kill` runs hundreds."""
    runs = {"calibrating": 6, "file to file, learned": 5}.get(work, 10)  # each kind of conversion gets its share
    command = [sys.executable, str(BENCH / "reliability.py"), "kill", "--runs", str(runs), "--json", "--work", work]
    done = subprocess.run(command, env=child_environment(1), capture_output=True, text=True, check=False, timeout=800)
    assert done.stdout, done.stderr[-2000:]
    tally = json.loads(done.stdout)
    assert tally["kills"] >= 1
    assert tally["damage"] == []
    assert tally["left"] == 0
    assert tally["lost"] <= tally["lost_bound"]
    assert tally["files"] > 0
    assert done.returncode == 0


def test_two_processes_calibrate_one_session(comfy, tmp_path):
    """Each saves after every call: the sums are those of one process that drew all the pictures."""
    from hswq.loader.model import inspect_model

    path = tmp_path / "stats" / "both.pt"
    code = CALIBRATES.format(steps=STEPS, pictures=PICTURES)
    processes = [start(code, path, first) for first in (0, PICTURES)]
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        process.communicate(timeout=300)
        assert process.returncode == 0
    both = load_session(path)
    assert both.calls == 2 * PICTURES * STEPS
    assert (both.images, both.steps) == (2 * PICTURES, {STEPS: 2 * PICTURES})
    model, watched = flux(tmp_path / "alone.pt", 50)
    for seed in range(2 * PICTURES):
        draw(watched, seed)
    assert_same_sums(both, load_session(tmp_path / "alone.pt"))
    states = load_states(states_path(path), inspect_model(model).fingerprint, MAX_STATES).states
    assert len(states) == both.calls


def test_the_lock_of_a_killed_process_is_free(comfy, tmp_path):
    path = tmp_path / "s.pt"
    _, watched = flux(path)
    holder = start(HOLDS, f"{path}.lock")
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert Path(f"{path}.lock").exists()
    draw(watched, 0)
    assert load_session(path).calls == STEPS


def test_a_process_that_hangs_holds_up_no_generation(comfy, tmp_path, monkeypatch, caplog):
    from hswq.loader.calibration import model as calibrate

    path = tmp_path / "s.pt"
    model, watched = flux(path)
    for name in ("PATIENCE", "PATIENCE_WITHIN_A_RUN"):
        monkeypatch.setattr(calibrate, name, 0.1)
    holder = start(HOLDS, f"{path}.lock")
    picture = draw(watched, 0)
    assert not path.exists()
    assert "another process that has been saving it for 0.1 s" in caplog.text
    assert "kept in memory until the next save" in caplog.text
    holder.communicate("go on\n")
    draw(watched, 1)
    assert (load_session(path).calls, load_session(path).images) == (2 * STEPS, 2)
    assert torch.equal(picture, draw(model, 0))


def test_two_threads_call_copies_of_the_model_at_once(comfy, tmp_path):
    """As MultiGPU does: within one run, each call goes to two models in threads, with the same wrappers."""
    _, single = flux(tmp_path / "single.pt", 50)
    draw(single, 0, 12)
    _, watched = flux(tmp_path / "double.pt", 1)
    other = inprocess.load_model(tiny.make("flux-tiny"))
    import comfy.model_management

    comfy.model_management.load_models_gpu([other])

    def both(apply_model, params):
        def second() -> None:
            with torch.inference_mode():
                other.model.apply_model(params["input"], params["timestep"], **params["c"])

        thread = threading.Thread(target=second)
        thread.start()
        output = apply_model(params["input"], params["timestep"], **params["c"])
        thread.join()
        return output

    watched.set_model_unet_function_wrapper(both)
    draw(watched, 0, 12)
    found = load_session(tmp_path / "double.pt")
    assert found.calls == 24
    assert_same_sums(found, load_session(tmp_path / "single.pt"), times=2)
    for patcher in (watched, other):
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in patcher.model.diffusion_model.modules())
