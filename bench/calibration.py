"""The cost of calibration: sampling with the Calibration node against sampling without it, and a session's size.

    nox -s bench -- calibration.py --models sdxl --threads 2

Reference models, through the node's own path with its defaults: hooks, kept calls, and saving at the end of the run.
Runs are paired, in alternating order; ratios are medians over the pairs, of wall-clock time and of CPU time, which
other work on the machine disturbs less. `--whole` instead measures the session of a full-size model with random
statistics.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from convert import random_session
from judge.options import begun, parser
from reference_models.architectures import REFERENCES, Reference
from reference_models.captions import TOKENS, WIDTH
from reference_models.sampling import BATCH, LATENT_SIZE
from rig import tiny
from rig.inprocess import load_model, sample

SAVE_EVERY = 50  # the node's default
Seconds = tuple[float, float]  # wall-clock, CPU


def main() -> None:
    """One row for each model."""
    asked = parser(__doc__)
    asked.add_argument("--pairs", type=int, default=15)
    asked.add_argument("--steps", type=int, default=20)
    asked.add_argument("--size", type=int, default=LATENT_SIZE, help="side of the latent")
    asked.add_argument("--batch", type=int, default=BATCH)
    asked.add_argument("--measure-every", type=int, nargs="+", help="a row for each; default: the node's")
    asked.add_argument("--whole", choices=sorted(tiny.KINDS), help="measure this model's session instead")
    options = begun(asked)
    if options.whole:
        print(whole_session(options.whole))
        return
    from hswq.nodes.calibration import MEASURE_EVERY

    print(
        "| model | calls measured | time / without | processor time / without | without, s | file, kB | in memory, kB |"
    )
    print("|---|--:|--:|--:|--:|--:|--:|")
    for name in options.models:
        for every in options.measure_every or [MEASURE_EVERY]:
            cells = measured(REFERENCES[name], options, every)
            print(f"| {REFERENCES[name].layout} | 1 in {every} | {cells} |", flush=True)


def measured(reference: Reference, options: argparse.Namespace, every: int) -> str:
    """The cells of a row."""
    from hswq.hswq_core.calibration.session import load_session
    from hswq.loader.calibration.model import calibrated

    with TemporaryDirectory() as folder, torch.inference_mode():
        path = Path(folder) / "bench.pt"
        plain = load_model(reference.file)
        models = [plain, calibrated(plain, path, SAVE_EVERY, lambda _line: None, measure_every=every)]
        pairs = [_pair(models, reference, options, number) for number in range(options.pairs + 1)][1:]  # one warms up
        ratios = [median(watched[i] / alone[i] for alone, watched in pairs) for i in (0, 1)]
        seconds = median(alone[0] for alone, _ in pairs)
        sizes = path.stat().st_size / 1e3, nbytes(load_session(path)) / 1e3
        return f"{ratios[0]:.3f} | {ratios[1]:.3f} | {seconds:.2f} | {sizes[0]:.0f} | {sizes[1]:.0f}"


def _pair(models: list[Any], reference: Reference, options: argparse.Namespace, number: int) -> list[Seconds]:
    """Times of one run without calibration and one with it; which runs first alternates."""
    seconds = dict[int, Seconds]()
    for which in sorted((0, 1), reverse=number % 2 == 1):
        clock, processor = time.perf_counter(), time.process_time()
        _draw(models[which], reference, options, number)
        seconds[which] = (time.perf_counter() - clock, time.process_time() - processor)
    return [seconds[0], seconds[1]]


def _draw(model: Any, reference: Reference, options: argparse.Namespace, seed: int) -> None:
    sample(
        model,
        steps=options.steps,
        size=options.size,
        batch=options.batch,
        cfg=reference.cfg,
        seed=seed,
        widths=(WIDTH, WIDTH if reference.pooled else 0),
        sampler=reference.sampler,
        scheduler=reference.scheduler,
        tokens=(TOKENS, TOKENS),
        **({} if reference.guidance is None else {"guidance": reference.guidance}),
    )


def whole_session(kind: str) -> str:
    """Number of layers and sizes of a full-size model's session."""
    from hswq.hswq_core.calibration.session import save_session

    session = random_session(tiny.make(kind))
    with TemporaryDirectory() as folder:
        path = Path(folder) / "whole.pt"
        clock = time.perf_counter()
        save_session(session, path)
        seconds, size = time.perf_counter() - clock, path.stat().st_size
    sizes = f"{size / 1e6:.1f} MB as a file, {nbytes(session) / 1e6:.1f} MB in memory"
    return f"{kind}: {len(session.layers)} layers, {sizes}, saved in {seconds:.2f} s"


def nbytes(session: Any) -> int:
    """Bytes of all tensors of a session."""
    sums = (tensor for stats in session.layers.values() for tensor in (stats.abs_sum, stats.mean_sum))
    return sum(tensor.nbytes for tensor in sums) + int(session.fingerprint.weights.nbytes)


if __name__ == "__main__":
    main()
