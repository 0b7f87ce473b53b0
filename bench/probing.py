"""Which cheap measure ranks layers the way the finished picture does?

    nox -s bench -- probing.py --models flux

Ground truth: one layer rounded at a time, four pictures drawn in 20 steps, the squared change of their pixels. It is
compared with what single calls say, for several numbers of states, relative to what the call removes or on the denoised
picture, and with a measure that needs no call. For each: rank correlation with the truth, and how much more change is
left than with the truth's own choice when 1, 3 and 6 % of the bytes are spent. Middle: only the middle half of each
picture's height and width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from judge.options import begun, parser
from judge.subject import Subject
from reference_models.architectures import REFERENCES, Reference
from reference_models.prompts import calibration_prompts
from reference_models.sampling import draw
from scipy.stats import spearmanr

PICTURES, OTHER_SET = 4, 7
BUDGETS = (1, 3, 6)
STATES = (1, 2, 4, 8, 16)
MIDDLE = "of the middle"
Measure = dict[str, float]


@dataclass
class Probed:
    """Measurements of one model: {layer: number} for each measure, and what keeping a layer costs."""

    truth: Measure
    measures: dict[str, Measure]
    cost: dict[str, int]
    smallest: int


def main() -> None:
    """Print one table per model."""
    options = begun(parser(__doc__))
    for name in options.models:
        with torch.inference_mode():
            print(f"\n{REFERENCES[name].layout}\n\n{table(probed(REFERENCES[name]))}", flush=True)


def probed(reference: Reference) -> Probed:
    """Measure with one layer rounded at a time, v2."""
    from hswq.loader.replay.replay import Replay

    job, rounder, outcome = Subject(reference, 32).solved("v2", BUDGETS[1])
    solutions = dict(outcome.solutions)
    states = job.states()[-max(STATES) :]
    side = states[0].tensors["x"].shape[-1] // 2
    replays = {"": Replay(job.model, states), MIDDLE: Replay(job.model, [state.cropped(side) for state in states])}
    prompts = calibration_prompts(PICTURES, OTHER_SET)
    pictures = draw(job.model, reference, prompts)
    truth: Measure = {}
    calls: dict[str, dict[str, list[tuple[float, float]]]] = {part: {} for part in replays}
    with replays[""].loaded():
        wanted = {part: replay.run() for part, replay in replays.items()}
        for name in solutions:
            made = rounder.delta(name)
            with replays[""].rounded({name: lambda made=made: made}):
                for part, replay in replays.items():
                    found = zip(replay.run(), wanted[part], strict=True)
                    calls[part][name] = [pair for a, b in found for pair in changes(a, b)]
                truth[name] = float((draw(job.model, reference, prompts) - pictures).square().mean())
    cost = {name: rounder.cost(name) for name in solutions}
    own = {name: solution.error for name, solution in solutions.items()}
    middle = {f"{label} {MIDDLE}": measure for label, measure in by_calls(calls[MIDDLE]).items()}
    known = {"own output error": own, **by_calls(calls[""]), **middle}
    return Probed(truth, known, cost, job.smallest(rounder.encoding))


def changes(found: Any, wanted: Any) -> list[tuple[float, float]]:
    """(squared change of the denoised latent, the same relative to what the call removes) for each state."""
    from hswq.loader.replay.replay import relative_change

    change = (found.denoised - wanted.denoised).square().flatten(1).sum(1)
    return list(zip(change.tolist(), relative_change(found, wanted).tolist(), strict=True))


def by_calls(calls: Mapping[str, list[tuple[float, float]]]) -> dict[str, Measure]:
    """{measure: {layer: number}} from all states' changes."""

    def mean(pick: Callable[[tuple[float, float]], float], count: int) -> Measure:
        return {name: sum(map(pick, pairs[:count])) / count for name, pairs in calls.items()}

    found = {f"{count} calls, relative": mean(lambda pair: pair[1], count) for count in STATES}
    return found | {f"{max(STATES)} calls, denoised": mean(lambda pair: pair[0], max(STATES))}


def by_shortlist(found: Probed, percent: float) -> Measure:
    """What the pack does with a large model: likely layers are measured by calls, the others estimated from those."""
    from hswq.loader.model_aware.probe import filled, likely

    own, calls = found.measures["own output error"], found.measures["2 calls, relative"]
    return filled({name: calls[name] for name in likely(own, found.cost, bytes_of(found, percent))}, own)


def table(found: Probed) -> str:
    """Markdown."""
    heads = " | ".join(f"+{budget} %" for budget in BUDGETS)
    lines = [f"| ranked by | rank correlation | {heads} |", "|---|--:|" + "--:|" * len(BUDGETS)]
    names = list(found.truth)
    for label, measure in found.measures.items():
        rank = spearmanr([found.truth[name] for name in names], [measure[name] for name in names]).statistic
        worse = " | ".join(f"{left(found, measure, budget):.1f} dB" for budget in BUDGETS)
        lines.append(f"| {label} | {rank:.2f} | {worse} |")
    worse = " | ".join(f"{left(found, by_shortlist(found, budget), budget):.1f} dB" for budget in BUDGETS)
    lines.append(f"| shortlist by own output error, then 2 calls | | {worse} |")
    return "\n".join(lines)


def left(found: Probed, measure: Measure, percent: float) -> float:
    """Change of the pictures that remains, in dB above that of the truth's choice."""
    from hswq.hswq_core.plan.budget import choose_kept

    budget, rests = bytes_of(found, percent), []
    for ranking in (measure, found.truth):
        kept = choose_kept(ranking, found.cost, budget)
        rests.append(sum(change for name, change in found.truth.items() if name not in kept))
    return 10 * math.log10(rests[0] / rests[1])


def bytes_of(found: Probed, percent: float) -> int:
    """Bytes to spend."""
    from hswq.hswq_core.plan.budget import Budget

    return Budget(percent).extra_bytes(found.smallest, len(found.cost))


if __name__ == "__main__":
    main()
