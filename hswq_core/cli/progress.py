"""The converter's progress as a bar on a terminal."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from ..plan import Progress

# A total of so much is one of bytes, not of layers.
BYTES = 10**6


@contextmanager
def bar() -> Iterator[Progress]:
    """A progress callback, (what, done, total): one bar for each stage, which is the first word of ``what``."""
    hidden = not logging.getLogger("hswq").isEnabledFor(logging.INFO)
    shown: tqdm[None] | None = None
    stage = ""

    def report(what: str, done: int, total: int) -> None:
        nonlocal shown, stage
        first = what.split(" ", 1)[0]
        if shown is None or first != stage:
            if shown is not None:
                shown.close()
            unit = {"unit": "B", "unit_scale": True} if total >= BYTES else {"unit": " layers"}
            stage, shown = first, tqdm(total=total, desc=first, disable=hidden or None, leave=False, **unit)
        shown.update(done - shown.n)

    try:
        yield report
    finally:
        if shown is not None:
            shown.close()
