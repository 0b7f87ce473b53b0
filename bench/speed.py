"""HSWQ's clip search and cast of SDXL-sized layers: this pack against the original's algorithm, as a Markdown table.

    python bench/speed.py --layers 20 --repeats 3 --threads 2

Random weights and importance, since the work does not depend on the values. The original's algorithm is written
here from its description: 200 candidates and three refinements make 800 passes; a pass casts the 4096 bin centres
by their distances to the 127 grid values. The whole weight is finally cast the same way, 10,000 elements at a time.
Both are timed in pairs on the same layer, in alternating order.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from rig import pack

pack.alias()

from hswq.hswq_core.quant.clip_search import importance_over_weight, search_amax  # noqa: E402
from hswq.hswq_core.quant.grid import FLOAT8_E4M3FN as GRID  # noqa: E402
from hswq.hswq_core.quant.metrics import weighted_square_sum  # noqa: E402
from hswq.hswq_core.quant.schemes.table import SCHEMES  # noqa: E402

FP8 = SCHEMES["fp8"]
SHAPES = [
    (640, 640),
    (320, 320, 3, 3),
    (10240, 1280),
    (1280, 1280, 3, 3),
    (1280, 1280),
    (640, 640, 3, 3),
    (1280, 5120),
    (1280, 2560, 3, 3),
    (640, 2048),
    (640, 320, 3, 3),
    (5120, 640),
    (1280, 640, 3, 3),
    (1280, 2048),
    (640, 960, 1, 1),
    (640, 2560),
    (640, 1920, 3, 3),
    (1280, 2816),
    (320, 640, 1, 1),
    (1280, 320),
    (320, 960, 3, 3),
]
BINS, CANDIDATES, ROUNDS, BATCH = 4096, 200, 4, 10_000
EQUALLY_GOOD = 0.01

# (weight, importance over the weight) -> codes, clip limit; only this call is timed.
Method = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, float]]


@dataclass(frozen=True)
class Pair:
    """Seconds for one layer, both ways."""

    shape: tuple[int, ...]
    ours: float
    original: float

    @property
    def ratio(self) -> float:
        """How many times faster ours was."""
        return self.original / self.ours


def ours(w: torch.Tensor, importance: torch.Tensor) -> tuple[torch.Tensor, float]:
    """What a V2 conversion does for one layer."""
    amax = search_amax(w, importance, FP8).amax
    return FP8.nearest_tensors(w, amax)["weight"], amax


def original(w: torch.Tensor, importance: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The same with the original's algorithm: one candidate at a time, distances to every grid value."""
    w = w.to(torch.float32)
    values = GRID.values()
    values = values[values >= 0]
    top = w.abs().max().item()
    bins = (w.abs() * (BINS / top)).long().clamp_(max=BINS - 1).flatten()
    mass = torch.bincount(bins, weights=importance.expand_as(w).flatten(), minlength=BINS)
    centers = (torch.arange(BINS) + 0.5) * (top / BINS)
    low, high, best, least = 0.5 * top, top, top, float("inf")
    for _ in range(ROUNDS):
        for amax in torch.linspace(low, high, CANDIDATES).tolist():
            scale = amax / GRID.max
            cast = nearest((centers / scale).clamp(max=GRID.max), values) * scale
            error = (mass * (cast - centers) ** 2).sum().item()
            if error < least:
                best, least = amax, error
        reach = (high - low) / 4
        low, high = max(0.1 * top, best - reach), min(1.2 * top, best + reach)
    flat = (w * (GRID.max / best)).clamp(-GRID.max, GRID.max).flatten()
    batches = [nearest(batch.abs(), values) * batch.sign() for batch in flat.split(BATCH)]
    return torch.cat(batches).view_as(w), best


def nearest(x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The grid value nearest to each element of ``x`` [n]."""
    return values[(x.unsqueeze(1) - values).abs().argmin(dim=1)]


def measure(shape: tuple[int, ...], seed: int, *, ours_first: bool) -> Pair:
    """Time one pair on new random values; raises if the two results are not equally good."""
    g = torch.Generator().manual_seed(seed)
    w = (torch.randn(shape, generator=g) * 0.02).half()
    importance = importance_over_weight("layer", shape, torch.rand(shape[1], generator=g) + 0.1)
    methods: list[Method] = [ours, original] if ours_first else [original, ours]
    seconds: dict[Method, float] = {}
    errors: dict[Method, float] = {}
    for method in methods:
        start = time.perf_counter()
        codes, amax = method(w, importance)
        seconds[method] = time.perf_counter() - start
        cast = GRID.dequantize(codes, GRID.scale(amax))
        errors[method] = weighted_square_sum(w, cast, importance).item()
    if abs(errors[ours] / errors[original] - 1) > EQUALLY_GOOD:
        raise RuntimeError(f"{shape}: error {errors[ours]:.4g}, the original's {errors[original]:.4g}")
    return Pair(shape, seconds[ours], seconds[original])


def table(pairs: list[Pair]) -> str:
    """Medians for each layer, and totals."""
    lines = ["| layer | weights | ours | original | times faster |", "|---|--:|--:|--:|--:|"]
    totals = [0.0, 0.0]
    for shape in dict.fromkeys(pair.shape for pair in pairs):
        of_shape = [pair for pair in pairs if pair.shape == shape]
        mine, theirs = median(p.ours for p in of_shape), median(p.original for p in of_shape)
        totals = [totals[0] + mine, totals[1] + theirs]
        name = f"{'Linear' if len(shape) == 2 else 'Conv2d'} {'×'.join(map(str, shape))}"
        ratio = median(p.ratio for p in of_shape)
        weights = torch.Size(shape).numel() / 1e6
        lines.append(f"| {name} | {weights:.1f} M | {mine:.3f} s | {theirs:.2f} s | {ratio:.1f} |")
    ratio = median(pair.ratio for pair in pairs)
    lines.append(f"| **all together** | | {totals[0]:.2f} s | {totals[1]:.1f} s | **{totals[1] / totals[0]:.1f}** |")
    lines.append(f"| **median of all pairs** | | | | **{ratio:.1f}** |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, default=len(SHAPES), help="how many of the layers")
    parser.add_argument("--repeats", type=int, default=3, help="pairs for each layer")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    measure((64, 64), 0, ours_first=True)  # warm up
    pairs = [
        measure(shape, seed, ours_first=(layer + seed) % 2 == 0)
        for seed in range(options.repeats)
        for layer, shape in enumerate(SHAPES[: options.layers])
    ]
    print(table(pairs))
    print(
        f"\nMedians of {options.repeats} pairs a layer, torch {torch.__version__} "
        f"with {options.threads} threads, {os.cpu_count()} CPU cores."
    )


if __name__ == "__main__":
    main()
