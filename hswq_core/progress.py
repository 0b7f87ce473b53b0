"""How long work says how far it has got."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol, TypeVar

# Seconds after which the speed of a stage is believed (guess).
WORTH_TELLING = 5.0


class Step(NamedTuple):
    """What is being done.

    Attributes:
        stage: has a bar and a clock of its own.
        subject: of the stage, for example a layer.
    """

    stage: str
    subject: str = ""

    def __str__(self) -> str:
        return f"{self.stage} {self.subject}".rstrip()


# (step, done, total); may raise to cancel. The unit of done and total is the stage's own.
Progress = Callable[[Step, int, int], None]


class Weighed(Protocol):
    """Something with a name and a size."""

    @property
    def name(self) -> str:
        """For people."""

    @property
    def nbytes(self) -> int:
        """How much of the work it is."""


W = TypeVar("W", bound=Weighed)


def no_progress(step: Step, done: int, total: int) -> None:
    """Progress of a caller that shows none."""


def time_left(seconds: float, done: int, total: int) -> str:
    """How long the rest takes, as ", 5 min left", if ``done`` of ``total`` took so long; "" while that says little."""
    if seconds < WORTH_TELLING or not 0 < done < total:
        return ""
    left = seconds * (total - done) / done
    return f", {left / 60:.0f} min left" if left >= 60 else f", {left:.0f} s left"


def announced(items: Sequence[W], stage: str) -> Iterator[tuple[W, tuple[Step, int, int]]]:
    """The items in order, each with the arguments of its ``Progress`` call: step, bytes done, bytes in all."""
    done, total = 0, sum(item.nbytes for item in items)
    for item in items:
        yield item, (Step(stage, item.name), done, total)
        done += item.nbytes


def each_of(items: Sequence[W], stage: str, progress: Progress) -> Iterator[W]:
    """The items in order, each after ``progress`` was called for it."""
    for item, said in announced(items, stage):
        progress(*said)
        yield item
