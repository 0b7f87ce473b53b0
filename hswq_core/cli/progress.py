"""The converter's progress as a terminal bar: bytes, speed and remaining time."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from ..progress import Progress, Step


@contextmanager
def bar() -> Iterator[Progress]:
    """A progress callback with one bar per stage."""
    hidden = not logging.getLogger("hswq").isEnabledFor(logging.INFO)
    shown: tqdm[None] | None = None
    stage = ""

    def report(step: Step, done: int, total: int) -> None:
        nonlocal shown, stage
        if shown is None or step.stage != stage:
            if shown is not None:
                shown.close()
            stage = step.stage
            shown = tqdm(total=total, desc=step.stage, unit="B", unit_scale=True, disable=hidden or None, leave=False)
        shown.update(done - shown.n)

    try:
        yield report
    finally:
        if shown is not None:
            shown.close()
