"""A long calibration in the real server: memory, speed, and every sum against an independent one.

    nox -s bench -- soak.py --calls 10000

A small random Flux, in runs of 20 steps, each with a different seed. Beside HSWQ Calibration, a node of the rig watches
the same layers and keeps its own sums: every call measured as the pack does (is one lost, or counted twice?), and in
float64 throughout (how exact is a single call?). Memory is the server's resident set after each run; the first tenth is
warm-up. Every fifth run is paired with one without calibration, to tell a slowdown from other work on the machine.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import psutil
from rig import pack, prompts, tiny
from rig.client import Prompt
from rig.graph import set_input
from rig.server import ComfyServer
from tqdm import tqdm

SESSION, STEPS = "soak", 20
WARM_UP = 0.1
PAIR_EVERY = 5
TESTNODES = pack.ROOT / "bench" / "rig" / "testnodes"


def main() -> None:
    """Print the findings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    pack.alias()
    with ComfyServer([TESTNODES], threads=options.threads) as server:
        found = soak(server, math.ceil(options.calls / STEPS))
    print(found.text())


@dataclass(frozen=True)
class Soaked:
    """Results of a soak.

    Attributes:
        calls, layers: of the session.
        memory: the server's resident set after each run, MB.
        seconds: of all runs.
        ratios: of runs with calibration to runs without, in order.
        to_calls, to_float64: largest relative difference of a sum to the witness's two kinds.
    """

    calls: int
    layers: int
    memory: list[float]
    seconds: float
    ratios: list[float]
    to_calls: float
    to_float64: float

    @property
    def warm(self) -> list[float]:
        """Memory after warm-up."""
        return self.memory[int(WARM_UP * len(self.memory)) :]

    @property
    def growth_mb(self) -> float:
        """Memory growth from the end of warm-up to the last run."""
        return self.warm[-1] - self.warm[0]

    @property
    def slowdown(self) -> float:
        """Median ratio of the last quarter of the pairs, divided by that of the first."""
        part = max(len(self.ratios) // 4, 1)
        return median(self.ratios[-part:]) / median(self.ratios[:part])

    def text(self) -> str:
        """Lines for people."""
        return "\n".join(
            [
                f"{self.calls} calls of {self.layers} layers in {self.seconds:.0f} s",
                f"memory: {self.growth_mb:+.1f} MB, {min(self.warm):.0f} to {max(self.warm):.0f} MB",
                f"seconds beside a run without calibration, last quarter / first: {self.slowdown:.3f}",
                f"largest difference to the sum of single calls: {self.to_calls:.1e}",
                f"largest difference to float64 throughout: {self.to_float64:.1e}",
            ]
        )


def soak(server: ComfyServer, runs: int) -> Soaked:
    """``runs`` sampling runs."""
    from hswq.hswq_core.calibration.session import load_session

    model = server.add_model("diffusion_models", tiny.make("flux-tiny"), "flux-tiny.safetensors")
    process = psutil.Process(server.process.pid)  # type: ignore[union-attr] - it is running
    began, memory, ratios = time.perf_counter(), [], []
    for seed in tqdm(range(runs)):
        seconds = _timed(server, prompt(model, seed))
        memory.append(process.memory_info().rss / 1e6)
        if seed % PAIR_EVERY == 0:
            ratios.append(seconds / _timed(server, uncalibrated(prompt(model, seed))))
    elapsed = time.perf_counter() - began
    whole = load_session(server.output / "hswq_stats" / f"{SESSION}.pt")
    with np.load(server.output / "witness.npz") as witness:
        sums = dict(witness)
    errors = (differences(whole, sums, kind) for kind in ("calls", "exact"))
    return Soaked(whole.calls, len(whole.layers), memory, elapsed, ratios, *errors)


def prompt(model: str, seed: int) -> Prompt:
    """A run without decoding: only sampling is soak-tested."""
    graph = prompts.flux(model, "", seed=seed, steps=STEPS)
    graph = prompts.insert(graph, "witness", prompts.node("RigWitness", model=["model", 0], name="witness"))
    settings = {"session": SESSION, "save_every": 50, "measure_every": 1}
    calibration = prompts.node("HSWQCalibration", model=["witness", 0], **settings)
    graph = prompts.insert(graph, "calibration", calibration, after="witness")
    for key in ("vae", "decode", "save"):
        del graph[key]
    return {**graph, "hooks": prompts.node("RigHooks", after=["sampler", 0])}


def uncalibrated(graph: Prompt) -> Prompt:
    """The same run, sampling straight from the loader."""
    rest = {key: entry for key, entry in graph.items() if key not in ("witness", "calibration")}
    return set_input(rest, "KSampler", model=["model", 0])


def _timed(server: ComfyServer, graph: Prompt) -> float:
    began = time.perf_counter()
    server.client.run(graph).check()
    return time.perf_counter() - began


def differences(session: Any, witness: dict[str, Any], kind: str) -> float:
    """Largest relative difference of any sum of any layer from the witness's sum of this kind.

    Sums that cancel (of x_c and y) are compared relative to the sum of |x_c| and to the root of the sum of y².
    """
    largest = 0.0
    for name, stats in session.layers.items():
        seen = {what: witness[f"{kind}|{name}|{what}"] for what in ("abs", "mean", "peak", "out", "squares", "calls")}
        if not stats.in_calls == stats.out_calls == seen["calls"] == session.calls:
            raise SystemExit(f"{name}: {stats.in_calls} and {stats.out_calls} calls recorded, {seen['calls']} seen")
        for ours, theirs, size in (
            (stats.abs_sum, seen["abs"], seen["abs"]),
            (stats.mean_sum, seen["mean"], seen["abs"]),
            (stats.input_amax, seen["peak"], seen["peak"]),
            (stats.out_sum, seen["out"], math.sqrt(seen["squares"] * seen["calls"])),
            (stats.out_sq_sum, seen["squares"], seen["squares"]),
        ):
            error = np.abs(np.asarray(ours) - theirs) / np.maximum(size, np.finfo(np.float64).tiny)
            largest = max(largest, float(np.max(error)))
    return largest


if __name__ == "__main__":
    main()
