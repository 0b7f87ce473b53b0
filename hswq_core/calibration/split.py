"""Splits states into those for rounding, for deciding and for verifying."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import SessionError
from .states import AUTO, DEFAULT_STATES, State

LEAST_STATES = 4
# The rest is for verification.
FIT_SHARE, DECIDE_SHARE = 0.75, 0.125
# With fewer, rounding overfits to the prompts, and deciding and verifying on the same prompts does not notice.
ENOUGH_PROMPTS = 12


@dataclass(frozen=True)
class Split:
    """Three non-empty parts.

    Attributes:
        fit: states that layers are rounded on.
        decide: held-out states for decisions.
        verify: held-out states to judge the finished plan.
        few_prompts: whether there are fewer than ``ENOUGH_PROMPTS`` in total.
    """

    fit: list[State]
    decide: list[State]
    verify: list[State]
    few_prompts: bool


def split_states(states: list[State]) -> Split:
    """Split states sorted by key, which is random. Raises SessionError for too few states."""
    if len(states) < LEAST_STATES:
        raise SessionError(
            "States of the session",
            got=f"{len(states)} model calls",
            expected=f"at least {LEAST_STATES}, better {DEFAULT_STATES}",
            remedy=f"Generate once more with the Calibration node, its states at {AUTO}, or choose hswq.",
        )
    decide = max(1, round(DECIDE_SHARE * len(states)))
    fit = min(max(2, round(FIT_SHARE * len(states))), len(states) - decide - 1)
    few = count_prompts(states) < ENOUGH_PROMPTS
    return Split(states[:fit], states[fit : fit + decide], states[fit + decide :], few)


def count_prompts(states: Iterable[State]) -> int:
    """Number of distinct prompts; an empty negative prompt counts too."""
    return len({state.prompt for state in states})
