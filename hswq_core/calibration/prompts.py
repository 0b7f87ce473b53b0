"""Calibration prompts: 128 shipped ones of many subjects and styles, and which one each index gets."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

SHIPPED = Path(__file__).with_name("calibration_prompts.txt")
# Odd, so that multiplying by it modulo 2**32 gives each index a different seed (Knuth's multiplicative hashing).
SPREAD, SEEDS = 2654435761, 2**32


@dataclass(frozen=True)
class Turn:
    """The prompt and seed for the picture of one index.

    Attributes:
        prompt: the text.
        seed: noise seed in [0, 2**32); different for each index below 2**32, across rounds too.
        number: position in the list, from 1.
        count: length of the list.
        round: 1 until every prompt has been used once.
    """

    prompt: str
    seed: int
    number: int
    count: int
    round: int

    def describe(self) -> str:
        """``17 of 128: <prompt>``, plus the round from the second on."""
        again = {1: "", 2: ", second round"}.get(self.round, f", round {self.round}")
        return f"{self.number} of {self.count}{again}: {self.prompt}"


def turn(index: int, prompts: tuple[str, ...]) -> Turn:
    """The turn for ``index`` (from 0); wraps around after the last prompt."""
    before, at = divmod(index, len(prompts))
    return Turn(prompts[at], index * SPREAD % SEEDS, at + 1, len(prompts), before + 1)


def prompts_in(text: str) -> tuple[str, ...]:
    """The prompts in a text, one per line, ignoring blank lines; the shipped ones if there are none."""
    lines = tuple(line.strip() for line in text.splitlines())
    return tuple(line for line in lines if line) or shipped_prompts()


@cache
def shipped_prompts() -> tuple[str, ...]:
    """The 128 prompts that come with the pack."""
    return tuple(SHIPPED.read_text(encoding="utf-8").splitlines())
