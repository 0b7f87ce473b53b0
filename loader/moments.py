"""Second moments of layer inputs, gathered from replayed states under a memory limit."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import comfy.model_management
import torch

from ..hswq_core.gram import Gram, Moments, input_rows
from .replay import Replay, window_of

# Of the free memory that the moments of one group may take.
MEMORY_SHARE = 0.25
# Two sets of them, to round by and to decide by, in float32.
BYTES_PER_ENTRY = 2 * 4


def shared_inputs(replay: Replay, layers: Iterable[str]) -> dict[str, str]:
    """{layer: the first layer that gets the same input tensor}, for every layer the states call."""
    seen: dict[int, tuple[weakref.ref[torch.Tensor], str]] = {}
    found: dict[str, str] = {}

    def see(name: str) -> Callable[[torch.Tensor], None]:
        window = window_of(replay.modules[name])

        def note(x: torch.Tensor) -> None:
            known = seen.get(id(x))
            if known is None or known[0]() is not x or window != window_of(replay.modules[known[1]]):
                known = seen[id(x)] = (weakref.ref(x), name)
            found.setdefault(name, known[1])

        return note

    with replay.watched({name: see(name) for name in layers}):
        replay.run()
    return found


def in_groups(replay: Replay, leaders: Iterable[str]) -> Iterator[list[str]]:
    """Layers whose moments fit into the memory that is free now, together, in order; at least one a group."""
    device = comfy.model_management.get_torch_device()
    limit = MEMORY_SHARE * comfy.model_management.get_free_memory(device)
    group: list[str] = []
    size = 0
    for name in leaders:
        own = BYTES_PER_ENTRY * columns_of(replay.modules[name]) ** 2
        if group and size + own > limit:
            yield group
            group, size = [], 0
        group.append(name)
        size += own
    if group:
        yield group


def gather(replay: Replay, layers: Iterable[str]) -> dict[str, Moments]:
    """Moments of the inputs of these layers over all states."""
    grams = {name: Gram(name, columns_of(replay.modules[name])) for name in layers}

    def see(name: str) -> Callable[[torch.Tensor], None]:
        module = replay.modules[name]

        def add(x: torch.Tensor) -> None:
            for rows in input_rows(x, type(module).__name__, window_of(module)):
                grams[name].add(rows)

        return add

    with replay.watched({name: see(name) for name in grams}):
        replay.run()
    return {name: gram.moments() for name, gram in grams.items()}


def columns_of(module: Any) -> int:
    """k: inputs that one output of a Linear or Conv2d sees, all groups together."""
    if type(module).__name__ == "Linear":
        return int(module.in_features)
    return int(module.in_channels * module.kernel_size[0] * module.kernel_size[1])
