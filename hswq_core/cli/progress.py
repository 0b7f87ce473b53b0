"""The converter's progress as a bar on a terminal: bytes, their speed, and how long the rest will take."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from ..plan import Progress


@contextmanager
def bar() -> Iterator[Progress]:
    """A progress callback, (what, bytes done, in all): one bar for each stage, which is the first word of ``what``."""
    hidden = not logging.getLogger("hswq").isEnabledFor(logging.INFO)
    shown: tqdm[None] | None = None
    stage = ""

    def report(what: str, done: int, total: int) -> None:
        nonlocal shown, stage
        first = what.split(" ", 1)[0]
        if shown is None or first != stage:
            if shown is not None:
                shown.close()
            stage = first
            shown = tqdm(total=total, desc=first, unit="B", unit_scale=True, disable=hidden or None, leave=False)
        shown.update(done - shown.n)

    try:
        yield report
    finally:
        if shown is not None:
            shown.close()
