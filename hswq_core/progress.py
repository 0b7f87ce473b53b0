"""Progress reporting for long-running work."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol, TypeVar

# Seconds before a stage's speed is trusted for an estimate (guess).
WORTH_TELLING = 5.0


class Step(NamedTuple):
    """The current step.

    Attributes:
        stage: shown with its own bar and timer.
        subject: the item being worked on, for example a layer.
    """

    stage: str
    subject: str = ""

    def __str__(self) -> str:
        return f"{self.stage} {self.subject}".rstrip()


# (step, done, total); may raise to cancel. Each stage chooses the unit of done and total.
Progress = Callable[[Step, int, int], None]


class Weighed(Protocol):
    """Something with a name and a size."""

    @property
    def name(self) -> str:
        """Display name."""

    @property
    def nbytes(self) -> int:
        """Its share of the work."""


W = TypeVar("W", bound=Weighed)


def no_progress(step: Step, done: int, total: int) -> None:
    """For callers that show no progress."""


def time_left(seconds: float, done: int, total: int) -> str:
    """Remaining time, as ", 5 min left", if ``done`` of ``total`` took ``seconds``; "" while too early to tell."""
    if seconds < WORTH_TELLING or not 0 < done < total:
        return ""
    left = seconds * (total - done) / done
    return f", {left / 60:.0f} min left" if left >= 60 else f", {left:.0f} s left"


def announced(items: Sequence[W], stage: str) -> Iterator[tuple[W, tuple[Step, int, int]]]:
    """The items in order, each with the arguments of its ``Progress`` call: step, bytes done, total bytes."""
    done, total = 0, sum(item.nbytes for item in items)
    for item in items:
        yield item, (Step(stage, item.name), done, total)
        done += item.nbytes


def each_of(items: Sequence[W], stage: str, progress: Progress) -> Iterator[W]:
    """The items in order, calling ``progress`` before each."""
    for item, arguments in announced(items, stage):
        progress(*arguments)
        yield item
