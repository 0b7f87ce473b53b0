"""Which states layers are rounded by, which decide, and which verify."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import SessionError
from .states import AUTO, DEFAULT_STATES, State

LEAST_STATES = 4
# The rest is to verify by.
FIT_SHARE, DECIDE_SHARE = 0.75, 0.125
# With fewer, rounding fits itself to the prompts, and choosing and verifying by the same ones does not notice.
ENOUGH_PROMPTS = 12


@dataclass(frozen=True)
class Split:
    """Three parts, none empty.

    Attributes:
        fit: to round layers by.
        decide: to choose by.
        verify: to judge the finished plan by.
        few_prompts: fewer than ``ENOUGH_PROMPTS`` in all.
    """

    fit: list[State]
    decide: list[State]
    verify: list[State]
    few_prompts: bool


def split_states(states: list[State]) -> Split:
    """In order of key, which is random. Raises SessionError for too few states."""
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
    """How many prompts they show; an empty negative one counts too."""
    return len({state.prompt for state in states})
