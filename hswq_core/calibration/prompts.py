"""Prompts to calibrate with: 128 that ship, of many subjects and styles, and which is whose turn."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

SHIPPED = Path(__file__).with_name("calibration_prompts.txt")
# Odd, so that multiplying by it modulo 2**32 gives each index another seed (Knuth's multiplicative hashing).
SPREAD, SEEDS = 2654435761, 2**32


@dataclass(frozen=True)
class Turn:
    """What the picture of one index is drawn from.

    Attributes:
        prompt: the text.
        seed: of its noise, in [0, 2**32); another one for each index below 2**32, in later rounds too.
        number: 1 for the first prompt of the list.
        count: prompts in the list.
        round: 1 until every prompt had its turn.
    """

    prompt: str
    seed: int
    number: int
    count: int
    round: int

    def describe(self) -> str:
        """``17 of 128: <prompt>``, from the second round on also which."""
        again = {1: "", 2: ", second round"}.get(self.round, f", round {self.round}")
        return f"{self.number} of {self.count}{again}: {self.prompt}"


def turn(index: int, prompts: tuple[str, ...]) -> Turn:
    """The turn of ``index``, from 0 on; after the last prompt comes the first one again."""
    before, at = divmod(index, len(prompts))
    return Turn(prompts[at], index * SPREAD % SEEDS, at + 1, len(prompts), before + 1)


def prompts_in(text: str) -> tuple[str, ...]:
    """The prompts of a text, one a line, without empty lines; the shipped ones if there is none."""
    lines = tuple(line.strip() for line in text.splitlines())
    return tuple(line for line in lines if line) or shipped_prompts()


@cache
def shipped_prompts() -> tuple[str, ...]:
    """The 128 prompts that come with the pack."""
    return tuple(SHIPPED.read_text(encoding="utf-8").splitlines())
