"""The command line's `convert`, file to file: seconds against copying the same file, and memory.

    nox -s bench -- convert.py --model sdxl --threads 2

Random weights, and a session of random statistics. Copying ends with fsync, as writing does. Memory is the process's
private memory: the source is mapped, and the system may drop its pages.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rig import pack, tiny
from rig.environment import child_environment

pack.alias()

from hswq.hswq_core.calibration.observer import LayerStats  # noqa: E402
from hswq.hswq_core.calibration.session import Session, save_session  # noqa: E402
from hswq.hswq_core.convert.file_model import FileModel  # noqa: E402

POLL = 0.05


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(tiny.KINDS), default="sdxl")
    parser.add_argument("--formats", nargs="+", default=["v2"])
    parser.add_argument("--methods", nargs="+", default=["hswq", "nearest"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args()
    source = tiny.make(options.model)
    print(f"{options.model}, {source.stat().st_size / 1e9:.2f} GB, {options.threads} threads\n")
    print("| what | seconds | / copying | peak, MB |\n|---|--:|--:|--:|")
    with TemporaryDirectory(dir=source.parent) as name:
        folder = Path(name)
        save_session(random_session(source), folder / "random.pt")
        for _ in range(options.repeats):
            base = copied(source, folder / "copy.bin")
            print(f"| copy and fsync | {base:.1f} | 1 | - |", flush=True)
            for method in options.methods:
                for file_format in options.formats:
                    seconds, peak = converted(source, folder, method, file_format, options.threads)
                    row = f"{seconds:.1f} | {seconds / base:.2f} | {peak / 1e6:.0f}"
                    print(f"| {method}, {file_format} | {row} |", flush=True)


def random_session(source: Path) -> Session:
    """Statistics of the right shapes."""
    model, layers = FileModel(source), {}
    rng = torch.Generator().manual_seed(0)
    for layer in model.layers:
        importance = torch.rand(layer.shape[1], generator=rng, dtype=torch.float64) + 0.1
        variance = float(torch.rand((), generator=rng))
        layers[layer.name] = LayerStats(
            layer.kind, layer.shape, 1, 1, 0.0, variance, importance, importance * 0.1, float(importance.max())
        )
    return Session(model.family.name, model.fingerprint(), layers, calls=1, images=1)


def copied(source: Path, target: Path) -> float:
    """Seconds to copy a file and sync it to disk."""
    began = time.perf_counter()
    with source.open("rb") as reading, target.open("wb") as writing:
        shutil.copyfileobj(reading, writing, 2**24)
        writing.flush()
        os.fsync(writing.fileno())
    seconds = time.perf_counter() - began
    target.unlink()
    return seconds


def converted(source: Path, folder: Path, method: str, file_format: str, threads: int) -> tuple[float, float]:
    """(seconds, peak private bytes of the process) of the command."""
    wish = ["--method", method, "--format", file_format, "--session", str(folder / "random.pt"), "-o", str(folder)]
    found = watched(["convert", str(source), *wish], threads)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    return found


def watched(arguments: list[str], threads: int) -> tuple[float, float]:
    """(seconds, peak private bytes of the process) of a command line."""
    command = [sys.executable, "-m", "hswq_core", "-q", *arguments]
    began = time.perf_counter()
    running = subprocess.Popen(command, cwd=pack.ROOT, env=child_environment(threads))
    peaks = [0.0]
    watcher = threading.Thread(target=_watch, args=(running, peaks))
    watcher.start()
    if running.wait():
        raise SystemExit(f"{' '.join(command)}: exit code {running.returncode}")
    watcher.join()
    return time.perf_counter() - began, peaks[0]


def _watch(running: subprocess.Popen[bytes], peaks: list[float]) -> None:
    status = Path(f"/proc/{running.pid}/status")
    while running.poll() is None:
        try:
            lines = status.read_text(encoding="ascii").splitlines()
        except OSError:
            return
        own = [int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")]
        peaks[0] = max([peaks[0], *own])
        time.sleep(POLL)


if __name__ == "__main__":
    main()
