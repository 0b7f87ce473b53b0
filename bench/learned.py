"""How well rounding without calibration does on inputs that layers really get.

    nox -s bench -- learned.py --models flux

Every layer of a reference model is rounded from its weight alone. Its output error on the inputs of recorded calls is
compared with nearest rounding, next to the quantized loss that the method minimizes. The rows are settings of the
method and, on a tenth of the layers, AdaRound's own relaxation of the same loss.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from judge.options import begun, parser
from judge.subject import Subject
from reference_models.architectures import REFERENCES

PICTURES, STATES = 16, 48
RIDGES, SAMPLES = (0.3, 0.5, 0.7, 0.85), (16, 256)
REGULARIZERS, RELAXED_STEPS, RELAXED_EVERY = (1, 10, 100), 400, 10


@dataclass(frozen=True)
class Seen:
    """A layer: its weight in units of the scale, [out, k], and the second moments of its real inputs."""

    name: str
    w: torch.Tensor
    gram: torch.Tensor


Rounder = Callable[[Seen], torch.Tensor]


def main() -> None:
    """Print one table per model."""
    for name in begun(parser(__doc__)).models:
        layers = seen(name)
        print(f"\n{REFERENCES[name].layout}, {len(layers)} layers\n\n{table(layers)}", flush=True)


def seen(name: str) -> list[Seen]:
    """The layers that the method rounds."""
    from hswq.hswq_core.methods.exclusions import Exclusions
    from hswq.hswq_core.methods.learned import LearnedOptions, learnable
    from hswq.hswq_core.quant.grid import FLOAT8_E4M3FN
    from hswq.loader.job import Job
    from hswq.loader.model_aware.gather import gather, shared_inputs
    from hswq.loader.replay.replay import Replay

    subject = Subject(REFERENCES[name], PICTURES, states=STATES)
    with torch.inference_mode():
        job = Job.open(subject.model, None, None, subject.session)
        replay = Replay(job.model, job.states())
        with replay.loaded():
            moments = gather(replay, list(shared_inputs(replay, job.by_name).leader))
        tiny, few = Exclusions(job.info.family).tiny, LearnedOptions().samples
        chosen = [
            layer for layer in job.layers if layer.weights > tiny and learnable(layer, few) and layer.name in moments
        ]
        read = {layer.name: job.read(layer).float().flatten(1) for layer in chosen}
    scales = {key: FLOAT8_E4M3FN.scale(w.abs().max()) for key, w in read.items()}
    # Cloned: inference-mode tensors cannot have gradients, which AdaRound needs.
    return [Seen(key, (w / scales[key]).clone(), moments[key].gram.clone()) for key, w in read.items()]


def table(layers: list[Seen]) -> str:
    """Markdown."""
    some = layers[::RELAXED_EVERY]
    return "\n".join(
        (
            "| rounding | quantized loss | real error | worst layer | layers worse | weight error | s a layer |",
            "|---|--:|--:|--:|--:|--:|--:|",
            *(row(f"ridge {ridge}", layers, by_descent(ridge=ridge)) for ridge in RIDGES),
            *(row(f"samples {samples}", layers, by_descent(samples=samples)) for samples in SAMPLES),
            row("no sweeps", layers, by_descent(iterations=0)),
            row("the defaults on some layers", some, by_descent()),
            *(row(f"AdaRound on these, regularized by {weight}", some, relaxed(weight)) for weight in REGULARIZERS),
        )
    )


def by_descent(ridge: float | None = None, **options: int) -> Rounder:
    """The method with other settings."""
    from hswq.hswq_core.methods import learned
    from hswq.hswq_core.quant.schemes.fp8 import Fp8Cast

    def rounded(layer: Seen) -> torch.Tensor:
        usual = learned.RIDGE
        learned.RIDGE = usual if ridge is None else ridge
        try:
            solution = learned.learn(layer.w, Fp8Cast(), learned.LearnedOptions(**options))
        finally:
            learned.RIDGE = usual
        return solution.codes.float()

    return rounded


def relaxed(weight: float) -> Rounder:
    """AdaRound (Nagel et al. 2020): place each weight between its two neighbours by a rectified sigmoid, using Adam.

    Args:
        weight: of the regularizer 1 - |2h - 1|^β, β from 20 to 2, against the loss relative to nearest rounding.
    """
    from hswq.hswq_core.methods.learned import LearnedOptions, input_moments
    from hswq.hswq_core.quant.grid import FLOAT8_E4M3FN

    def rounded(layer: Seen) -> torch.Tensor:
        w, moments, values = layer.w, input_moments(layer.w, LearnedOptions()), FLOAT8_E4M3FN.values()
        above = torch.bucketize(w, values).clamp(1, len(values) - 1)
        low, gap = values[above - 1], values[above] - values[above - 1]
        share = ((w - low) / gap).clamp(0, 1)
        v = torch.logit((share + 0.1) / 1.2).requires_grad_()
        adam = torch.optim.Adam([v], lr=0.02)
        plain = moments.losses(FLOAT8_E4M3FN.nearest(w) - w).sum()
        for step in range(RELAXED_STEPS):
            h = (v.sigmoid() * 1.2 - 0.1).clamp(0, 1)
            beta = 2 + 9 * (1 + math.cos(math.pi * step / RELAXED_STEPS))
            penalty = (1 - (2 * h - 1).abs() ** beta).mean()
            adam.zero_grad()
            (moments.losses(low + h * gap - w).sum() / plain + weight * penalty).backward()
            adam.step()
        return low + (v.detach() >= 0) * gap

    return rounded


def row(label: str, layers: list[Seen], rounder: Rounder) -> str:
    """One line: geometric means over the layers, relative to nearest rounding."""
    from hswq.hswq_core.methods.learned import LearnedOptions, input_moments
    from hswq.hswq_core.quant.grid import FLOAT8_E4M3FN
    from hswq.hswq_core.quant.moments import output_error

    began, found = time.perf_counter(), [rounder(layer) for layer in layers]
    seconds = (time.perf_counter() - began) / len(layers)
    ratios = []
    for layer, rounded in zip(layers, found, strict=True):
        deltas = rounded - layer.w, FLOAT8_E4M3FN.nearest(layer.w) - layer.w
        moments = input_moments(layer.w, LearnedOptions())
        loss, real, own = (
            [measure(delta) for delta in deltas]
            for measure in (
                lambda delta, moments=moments: moments.losses(delta).sum().item(),
                lambda delta, gram=layer.gram: output_error(delta, gram),
                lambda delta: delta.square().sum().item(),
            )
        )
        ratios.append([pair[0] / pair[1] for pair in (loss, real, own)])
    table_of = torch.tensor(ratios)
    loss, real, own = table_of.log().mean(0).exp().tolist()
    worst, worse = table_of[:, 1].max().item(), int((table_of[:, 1] > 1).sum())
    return f"| {label} | {loss:.2f} | {real:.2f} | {worst:.2f} | {worse}/{len(layers)} | {own:.2f} | {seconds:.1f} |"


if __name__ == "__main__":
    main()
