"""Files from strangers: refused by name or harmless, within a second or so and a GB, whatever is in them."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("resource", reason="limits of memory are Unix's")

from fuzzing import mutate, seeds
from fuzzing.file_attacks import HARMLESS
from fuzzing.replay import READERS, read_checkpoint
from fuzzing.targets import TARGETS

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="how much a process has is read the way of Linux")
BENCH = Path(__file__).resolve().parents[3] / "bench"
FOUND = Path(__file__).resolve().parents[2] / "data" / "hostile"
NAMES = [f"{kind}: {name}" for kind, rows, _, _ in READERS for name in rows]
NAMES += [f"found: {file.name}" for file in sorted(FOUND.glob("*-*"))]
# Benchmarks say how long they take; this only tells an end from none, on a machine that is busy with other things.
ENDLESS = 60.0
MUTATIONS = 500


@pytest.fixture(scope="module")
def replayed() -> dict[str, dict[str, Any]]:
    """All of them, read in a process of their own."""
    command = [sys.executable, "-m", "fuzzing.replay"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=BENCH, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {line["name"]: line for line in lines}


@pytest.mark.parametrize("name", NAMES)
def test_an_attack_is_refused_by_our_own_error(name, replayed):
    line = replayed[name]
    assert line["sound"], line["result"]
    assert (line["result"] == "opened") == (name in HARMLESS)
    assert line["seconds"] < ENDLESS
    assert line["megabytes"] < 1074


def test_what_no_attack_changed_opens(tmp_path):
    """So that each is refused for what is wrong with it."""
    makers = {"session": seeds.session, "checkpoint": seeds.checkpoint, "states": seeds.states}
    for kind, _, read, suffix in READERS:
        found = read(makers[kind](tmp_path / f"good{suffix}"))
        if read is read_checkpoint:
            found = [line for line in found if "no scale" not in line]  # one layer has none, to be fuzzed
            assert found == []


@pytest.mark.parametrize("name", TARGETS)
def test_what_fuzzing_starts_from_is_taken_by_its_target(name, tmp_path):
    for data in TARGETS[name].seeds(tmp_path):
        TARGETS[name].run(data, tmp_path)


@pytest.mark.parametrize("name", TARGETS)
def test_mutated_input_is_taken_or_refused_by_our_own_error(name, tmp_path):
    """What `nox -s fuzz` does by the million, guided by coverage, here by chance."""
    target, rng = TARGETS[name], random.Random(name)
    good = target.seeds(tmp_path)
    for _ in range(MUTATIONS):
        data = rng.choice(good)
        own = target.mutation(data, rng) if target.mutation and rng.random() < 0.7 else None
        target.run(mutate.some_bytes(data, rng) if own is None else own, tmp_path)


def test_the_limit_would_stop_a_reader():
    code = "from fuzzing.limits import limit\nwith limit(2**30): bytearray(2**30)"
    done = subprocess.run([sys.executable, "-c", code], cwd=BENCH, capture_output=True, text=True, check=False)
    assert "MemoryError" in done.stderr
