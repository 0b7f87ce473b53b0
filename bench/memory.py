"""Converts a full-size file under a memory limit, and verifies every tensor of the result.

    nox -s bench -- memory.py --model flux --limit-gb 6

Random weights, and a session of random statistics. The limit is set by a control group (Linux, needs permission to make
one), which counts the process's memory and the file pages it keeps. Each FP8 weight must equal the core's own cast with
the plan's clip limit, each scale must be that limit's, and every other tensor must equal the source's, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rig import large, pack
from rig.environment import child_environment

pack.alias()

from convert import random_session  # noqa: E402
from hswq.hswq_core.calibration.session import save_session  # noqa: E402
from hswq.hswq_core.convert.header import PLAN_KEY  # noqa: E402
from hswq.hswq_core.files.checkpoint import FileSource  # noqa: E402
from hswq.hswq_core.plan.formats import FORMATS  # noqa: E402
from hswq.hswq_core.plan.plan import QUANTIZE, Plan  # noqa: E402

GROUPS = Path("/sys/fs/cgroup")


def main() -> None:
    """Print one line for each method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(large.KINDS), default="flux")
    parser.add_argument("--methods", nargs="+", default=["hswq", "nearest"])
    parser.add_argument("--format", default="v2")
    parser.add_argument("--limit-gb", type=float, default=6.0)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    source = large.make(options.model)
    print(f"{options.model}, {source.stat().st_size / 1e9:.2f} GB, limit {options.limit_gb:g} GB")
    with TemporaryDirectory(dir=source.parent) as name:
        folder = Path(name)
        save_session(random_session(source), folder / "random.pt")
        for method in options.methods:
            seconds, peak = converted(source, folder, method, options)
            (made,) = folder.glob("*.safetensors")
            checked = verified(source, made)
            print(f"{method}, {options.format}: {seconds:.0f} s, peak {peak / 1e9:.2f} GB, {checked}", flush=True)
            made.unlink()


def converted(source: Path, folder: Path, method: str, options: argparse.Namespace) -> tuple[float, int]:
    """(seconds, peak bytes counted against the limit) of the command."""
    wish = ["--method", method, "--format", options.format, "--session", str(folder / "random.pt"), "-o", str(folder)]
    command = [sys.executable, "-m", "hswq_core", "-q", "convert", str(source), *wish]
    with limited(round(options.limit_gb * 2**30)) as group:
        began = time.perf_counter()
        subprocess.run(
            ["sh", "-c", f'echo $$ > "{group}/cgroup.procs" && exec "$@"', "sh", *command],
            cwd=pack.ROOT,
            env=child_environment(options.threads),
            check=True,
        )
        peaks = [group / name for name in ("memory.peak", "memory.max_usage_in_bytes")]
        peak = next((int(file.read_text()) for file in peaks if file.exists()), 0)
        return time.perf_counter() - began, peak


@contextmanager
def limited(size: int) -> Iterator[Path]:
    """A control group limited to ``size`` bytes, cgroup version 1 or 2."""
    first = (GROUPS / "memory").is_dir()
    group = (GROUPS / "memory" if first else GROUPS) / "hswq-bench"
    group.mkdir()
    try:
        (group / ("memory.limit_in_bytes" if first else "memory.max")).write_text(str(size))
        yield group
    finally:
        group.rmdir()


def verified(source: Path, made: Path) -> str:
    """How many tensors are correct; raises at the first that is not."""
    before, after = FileSource(source), FileSource(made)
    plan = Plan.from_json(after.metadata[PLAN_KEY])
    row = FORMATS[json.loads(after.metadata["hswq"])["format"]]
    layers = {f"{layer.name}.weight": layer for layer in plan.layers if layer.action == QUANTIZE}
    expected = 0
    for key in before.entries:
        wanted = {key: before.read(key)}
        if (layer := layers.get(key)) is not None:
            tensors = layer.stored.nearest_tensors(wanted[key], layer.amax)
            spelled = row.spelled(layer.stored, tensors, None)
            wanted = {key[: -len("weight")] + suffix: tensor for suffix, tensor in spelled.items()}
        for name, tensor in wanted.items():
            expected += 1
            found = after.read(name)
            same = found.dtype == tensor.dtype and found.shape == tensor.shape
            if not same or not torch.equal(found.view(torch.uint8), tensor.contiguous().view(torch.uint8)):
                raise SystemExit(f"{made.name}, {name}: not what the plan says")
    if expected != len(after.entries):
        raise SystemExit(f"{made.name}: {len(after.entries)} tensors, expected {expected}")
    return f"{expected} tensors verified, {len(layers)} in FP8"


if __name__ == "__main__":
    main()
