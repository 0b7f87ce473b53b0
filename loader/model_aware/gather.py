"""Second moments of layer inputs, gathered from replayed states under a memory limit."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from ...hswq_core.model.kinds import Window, kind_of
from ...hswq_core.quant.moments import Gram, Held, Moments, Rows
from ..devices import BYTES_PER_NUMBER, free_bytes, model_device, solver_device
from ..replay.replay import Replay

# Share of the free memory for what is gathered for one group.
MEMORY_SHARE = 0.4


@dataclass(frozen=True)
class Inputs:
    """Which layers get the same input, as seen in a replay.

    Attributes:
        leader: {layer: the first layer that gets the same tensor}, for every layer the states call, in call order.
        rows: {leader: input rows over all states}.
    """

    leader: dict[str, str]
    rows: dict[str, int]


def shared_inputs(replay: Replay, layers: Iterable[str]) -> Inputs:
    """Run every state, and record which layers share their inputs."""
    seen: dict[int, tuple[weakref.ref[torch.Tensor], str]] = {}
    shared = Inputs({}, {})

    def see(name: str) -> Callable[[torch.Tensor], None]:
        module = replay.modules[name]
        kind, window = kind_of(module), _window(module)

        def note(x: torch.Tensor) -> None:
            known = seen.get(id(x))
            if known is None or known[0]() is not x or window != _window(replay.modules[known[1]]):
                known = seen[id(x)] = (weakref.ref(x), name)
            leader = shared.leader.setdefault(name, known[1])
            if leader == name:
                shared.rows[name] = shared.rows.get(name, 0) + kind.count(x, window)

        return note

    replay.watch({name: see(name) for name in layers})
    return shared


def in_groups(replay: Replay, rows: Mapping[str, int]) -> Iterator[list[str]]:
    """Layers in order, in groups whose gathered inputs fit into the memory free now; at least one layer per group.

    Args:
        rows: {layer: held-out input rows to decide by}; those to round by become moments.
    """
    limit = MEMORY_SHARE * free_bytes(model_device())
    group: list[str] = []
    size = 0
    for name, held in rows.items():
        width = columns(replay.modules[name])
        needed = BYTES_PER_NUMBER * width * (width + min(width, held))
        if group and size + needed > limit:
            yield group
            group, size = [], 0
        group.append(name)
        size += needed
    if group:
        yield group


def gather(replay: Replay, layers: Sequence[str], device: torch.device | None = None) -> dict[str, Moments]:
    """Moments of the inputs of these layers, in call order, over all states.

    device: to sum on; None: where there is room.
    """
    grams = {name: Gram(name, columns(replay.modules[name]), device or _room(replay, name)) for name in layers}
    _feed(replay, grams)
    return {name: gram.moments() for name, gram in grams.items()}


def hold(replay: Replay, layers: Sequence[str], device: torch.device | None = None) -> dict[str, Moments | Rows]:
    """Held-out inputs of these layers, in call order, over all states, to decide by; ``device`` as for ``gather``."""
    held = {name: Held(name, columns(replay.modules[name]), device or _room(replay, name)) for name in layers}
    _feed(replay, held)
    return {name: one.inputs() for name, one in held.items()}


def _feed(replay: Replay, into: Mapping[str, Gram | Held]) -> None:
    def see(name: str) -> Callable[[torch.Tensor], None]:
        module = replay.modules[name]
        kind, window = kind_of(module), _window(module)

        def add(x: torch.Tensor) -> None:
            for rows in kind.rows(x, window):
                into[name].add(rows)

        return add

    replay.watch({name: see(name) for name in into}, last=list(into)[-1])


def _room(replay: Replay, name: str) -> torch.device:
    return solver_device(columns(replay.modules[name]), model_device())


def columns(module: torch.nn.Module) -> int:
    """k: inputs that one output of a layer sees, all groups together."""
    return kind_of(module).columns(module)


def _window(module: torch.nn.Module) -> Window:
    return kind_of(module).window(module)
