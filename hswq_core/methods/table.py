"""Table of the methods that need no running model, by name."""

from __future__ import annotations

from .hswq import HSWQ
from .learned import LEARNED
from .method import Method, Task
from .nearest import NEAREST

METHODS: dict[str, Method[Task]] = {row.name: row for row in (HSWQ, LEARNED, NEAREST)}
