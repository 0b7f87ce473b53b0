"""Is a session's calibration enough? How far its statistics were, at earlier saves, from what they are now."""

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

# What one doubling of the calls may still change: of the layers' levels, and of the kept layers. Guesses, on the
# careful side: by one picture, whose levels were 2 to 5 % from those of 32, hswq converted the Flux and the SDXL
# reference model no worse than by 32.
ENOUGH_LEVEL, ENOUGH_KEPT = 0.02, 0.05
# What counts as about half the calls (guess).
HALF = (0.25, 0.7)
# More samples than HSWQ's authors ask for are never asked for.
MOST_PROMPTS = 256
ENOUGH, MORE, UNKNOWN = "enough", "more", "unknown"


@dataclass(frozen=True)
class Distance:
    """How far statistics of fewer calls were from those of all.

    Attributes:
        calls, images: then.
        changed: layers that hswq would have kept then and would not keep now.
        kept: layers that hswq would keep now.
        level: median over layers of |level then - level now| / level now.
    """

    calls: int
    images: int
    changed: int
    kept: int
    level: float

    @property
    def common(self) -> float:
        """Share of the kept layers in common."""
        return 1 - self.changed / self.kept if self.kept else 1.0


@dataclass(frozen=True)
class Verdict:
    """An answer: ``ENOUGH``, ``MORE`` or ``UNKNOWN``, and a sentence."""

    answer: str
    text: str


def never_quantized(session: Session) -> dict[str, str]:
    """{layer: why hswq would never quantize it}."""
    rules = Exclusions(family_named(session.family))
    found = {}
    for name, stats in session.layers.items():
        reason = rules.reason(Layer(name, stats.kind, stats.shape, torch.float16), stats)
        if reason is not None:
            found[name] = reason
    return found


def distances(session: Session, excluded: Collection[str]) -> list[Distance]:
    """For each point of the history and, as the last, for now, where all is 0.

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
    """Layers that hswq keeps at its usual ratio, of those it chooses among."""
    return keep_by_sensitivity({name: s for name, s in sensitivity.items() if name not in excluded}, DEFAULT_KEEP_RATIO)


def _apart(point: Point, now: Point) -> float:
    called = now.level > 0
    if not bool(called.any()):
        return 0.0
    then, at_last = point.level[called].double(), now.level[called].double()
    return float(((then - at_last).abs() / at_last).median())


def verdict(found: list[Distance]) -> Verdict:
    """Whether the statistics are enough for method hswq, by what the last doubling of the calls changed."""
    now = found[-1]
    half = _half(found)
    if half is None:
        return Verdict(UNKNOWN, "Too few points to tell: generate once or twice more.")
    told = (
        f"the last doubling of the calls (from {half.calls} to {now.calls}) changed layers' statistics by "
        f"{half.level:.1%} and {half.changed} of {half.kept} kept layers"
    )
    excess = max(half.level / ENOUGH_LEVEL, half.changed / allowed_changes(half.kept))
    if excess <= 1:
        return Verdict(ENOUGH, f"Enough: {told}.")
    more = _more(now, excess)
    return Verdict(MORE, f"Not enough yet: {told}. Generate {more} more {'prompt' if more == 1 else 'prompts'}.")


def allowed_changes(kept: int) -> float:
    """How many of the kept layers a doubling of the calls may change; one always."""
    return max(1.0, ENOUGH_KEPT * kept)


def _half(found: list[Distance]) -> Distance | None:
    """The point nearest to half the calls; of a run that had not ended none tells."""
    now = found[-1]
    lowest, highest = (share * now.calls for share in HALF)
    near = [d for d in found[:-1] if lowest <= d.calls <= highest and (d.images or not now.images)]
    return min(near, key=lambda d: abs(math.log(2 * d.calls / now.calls)), default=None)


def _more(now: Distance, excess: float) -> int:
    """Prompts until a doubling changes no more than is allowed, if changes fall with the root of the calls (guess)."""
    prompts = now.images or now.calls  # text encoders are called once a prompt
    return min(MOST_PROMPTS, max(1, math.ceil(prompts * (excess**2 - 1))))


@dataclass(frozen=True)
class KeptCalls:
    """The model calls kept beside a session.

    Attributes:
        calls: how many.
        prompts: that they show.
    """

    calls: int
    prompts: int

    def verdict(self) -> Verdict:
        """Whether they are enough for method model_aware.

        On the reference models one picture was worth 49.9, 54.7 and 54.8 dB at +3 %, 32 pictures with 32 calls kept
        50.2, 55.2 and 56.5, with 128 calls kept 52.1, 56.9 and 57.4, with 512 kept 53.0, 57.3 and 57.4.
        """
        told = f"{_some(self.calls, 'call')} of {_some(self.prompts, 'prompt')} kept"
        if not self.calls:
            return Verdict(MORE, "No calls kept: set the Calibration node's states above 0 and generate once more.")
        if self.prompts < ENOUGH_PROMPTS:
            lack = ENOUGH_PROMPTS - self.prompts
            return Verdict(MORE, f"Not enough yet: {told}. Generate {_some(lack, 'more prompt')}.")
        if self.calls < DEFAULT_STATES:
            return Verdict(MORE, f"Usable: {told}; {DEFAULT_STATES} calls measured 0.9 to 1.9 dB better than 32.")
        return Verdict(ENOUGH, f"Enough: {told}.")


def _some(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
