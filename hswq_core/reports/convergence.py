"""Judges whether calibration is sufficient, by how far statistics at earlier saves were from the current ones."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch

from ..calibration.history import Point, point_of
from ..calibration.session import Session
from ..calibration.split import ENOUGH_PROMPTS
from ..calibration.states import DEFAULT_STATES
from ..methods.exclusions import Exclusions
from ..methods.hswq import DEFAULT_KEEP_RATIO, keep_by_sensitivity
from ..model.families import family_named
from ..model.layer import Layer

# How much doubling the calls may still change the layers' levels, and the kept layers. Conservative guesses: with one
# picture, whose levels were 2 to 5 % from those of 32, hswq converted the Flux and SDXL reference models no worse than
# with 32.
ENOUGH_LEVEL, ENOUGH_KEPT = 0.02, 0.05
# Shares that count as about half the calls (guess).
HALF = (0.25, 0.7)
# Never ask for more prompts than the number of samples HSWQ's authors recommend.
MOST_PROMPTS = 256
ENOUGH, MORE, UNKNOWN = "enough", "more", "unknown"


@dataclass(frozen=True)
class Distance:
    """Distance of earlier statistics from those of all calls.

    Attributes:
        calls, images: counts at that time.
        changed: number of layers that hswq would have kept then but would not keep now.
        kept: number of layers that hswq would keep now.
        level: median over layers of |level then - level now| / level now.
    """

    calls: int
    images: int
    changed: int
    kept: int
    level: float

    @property
    def common(self) -> float:
        """Share of kept layers in common."""
        return 1 - self.changed / self.kept if self.kept else 1.0


@dataclass(frozen=True)
class Verdict:
    """An answer, ``ENOUGH``, ``MORE`` or ``UNKNOWN``, and a sentence explaining it."""

    answer: str
    text: str


def never_quantized(session: Session) -> dict[str, str]:
    """{layer: why hswq would never quantize it}."""
    rules = Exclusions(family_named(session.family))
    reasons = {}
    for name, stats in session.layers.items():
        reason = rules.reason(Layer(name, stats.kind, stats.shape, torch.float16), stats)
        if reason is not None:
            reasons[name] = reason
    return reasons


def distances(session: Session, excluded: Collection[str]) -> list[Distance]:
    """One for each point of the history, then one for now, which is all zero.

    Args:
        excluded: layers that hswq does not choose among.
    """
    now = point_of(session.layers, session.calls, session.images)
    names = sorted(session.layers)
    kept = _kept(now, names, excluded)
    earlier = [point for point in session.history if point.calls < now.calls]
    return [
        Distance(p.calls, p.images, len(_kept(p, names, excluded) - kept), len(kept), _apart(p, now))
        for p in (*earlier, now)
    ]


def _kept(point: Point, names: list[str], excluded: Collection[str]) -> set[str]:
    return would_keep(dict(zip(names, point.sensitivity.tolist(), strict=True)), excluded)


def would_keep(sensitivity: Mapping[str, float], excluded: Collection[str]) -> set[str]:
    """Layers that hswq keeps at its default ratio, excluding ``excluded``."""
    return keep_by_sensitivity({name: s for name, s in sensitivity.items() if name not in excluded}, DEFAULT_KEEP_RATIO)


def _apart(point: Point, now: Point) -> float:
    called = now.level > 0
    if not bool(called.any()):
        return 0.0
    earlier, current = point.level[called].double(), now.level[called].double()
    return float(((earlier - current).abs() / current).median())


def verdict(history: list[Distance]) -> Verdict:
    """Whether the statistics suffice for method hswq, judged by what the last doubling of the calls changed."""
    now = history[-1]
    half = _half(history)
    if half is None:
        return Verdict(UNKNOWN, "Too few points to tell: generate once or twice more.")
    summary = (
        f"the last doubling of the calls (from {half.calls} to {now.calls}) changed layers' statistics by "
        f"{half.level:.1%} and {half.changed} of {half.kept} kept layers"
    )
    excess = max(half.level / ENOUGH_LEVEL, half.changed / allowed_changes(half.kept))
    if excess <= 1:
        return Verdict(ENOUGH, f"Enough: {summary}.")
    more = _more(now, excess)
    return Verdict(MORE, f"Not enough yet: {summary}. Generate {more} more {'prompt' if more == 1 else 'prompts'}.")


def allowed_changes(kept: int) -> float:
    """How many kept layers a doubling of the calls may change; at least one."""
    return max(1.0, ENOUGH_KEPT * kept)


def _half(history: list[Distance]) -> Distance | None:
    """The point closest to half the calls, ignoring those from an unfinished first run."""
    now = history[-1]
    lowest, highest = (share * now.calls for share in HALF)
    near = [d for d in history[:-1] if lowest <= d.calls <= highest and (d.images or not now.images)]
    return min(near, key=lambda d: abs(math.log(2 * d.calls / now.calls)), default=None)


def _more(now: Distance, excess: float) -> int:
    """Prompts needed to get within limits, assuming changes fall with the square root of the calls (guess)."""
    prompts = now.images or now.calls  # text encoders are called once per prompt
    return min(MOST_PROMPTS, max(1, math.ceil(prompts * (excess**2 - 1))))


@dataclass(frozen=True)
class KeptCalls:
    """The model calls kept beside a session.

    Attributes:
        calls: number of calls.
        prompts: number of distinct prompts among them.
    """

    calls: int
    prompts: int

    def verdict(self) -> Verdict:
        """Whether they suffice for method model_aware.

        On the reference models one picture gave 49.9, 54.7 and 54.8 dB at +3 %, 32 pictures with 32 calls kept
        50.2, 55.2 and 56.5, with 128 calls kept 52.1, 56.9 and 57.4, with 512 kept 53.0, 57.3 and 57.4.
        """
        summary = f"{_some(self.calls, 'call')} of {_some(self.prompts, 'prompt')} kept"
        if not self.calls:
            return Verdict(MORE, "No calls kept: set the Calibration node's states above 0 and generate once more.")
        if self.prompts < ENOUGH_PROMPTS:
            lack = ENOUGH_PROMPTS - self.prompts
            return Verdict(MORE, f"Not enough yet: {summary}. Generate {_some(lack, 'more prompt')}.")
        if self.calls < DEFAULT_STATES:
            return Verdict(MORE, f"Usable: {summary}; {DEFAULT_STATES} calls measured 0.9 to 1.9 dB better than 32.")
        return Verdict(ENOUGH, f"Enough: {summary}.")


def _some(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
