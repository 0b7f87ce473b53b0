"""Blocks that run before a changed layer cannot have changed: they answer with what they gave before.

Probing changes one layer at a time; on the average half of a call goes by before it comes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from ...hswq_core.calibration.states import State
from ..devices import free_bytes
from .blocks import answering, holding, is_in, mapped, tensors_in
from .replay import Delta, Output, Replay, hooked, relative_change

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

log = logging.getLogger(__name__)

# Of the free memory that the answers may take.
MEMORY_SHARE = 0.2
# Squared relative change of the output that is none: what a GPU does in another order.
SAME = 1e-10


@dataclass
class _Recorder:
    """What the outermost modules gave, call by call.

    Attributes:
        limit: bytes that the answers of the first batch may take; blocks behind that are not kept.
        given: {block: its outputs, one a batch}, in order of call.
        order: blocks of each batch, in order of call.
    """

    limit: float
    given: dict[str, list[object]] = field(default_factory=dict)
    order: list[list[str]] = field(default_factory=list)
    depth: int = 0
    size: int = 0

    def enter(self, _module: torch.nn.Module, _args: object) -> None:
        self.depth += 1

    def leave(self, name: str) -> Callable[..., None]:
        def hook(_module: torch.nn.Module, _args: object, output: object) -> None:
            self.depth -= 1
            if self.depth:
                return
            self.order[-1].append(name)
            if len(self.order) == 1:
                self.size += sum(tensor.nbytes for tensor in tensors_in(output))
                if self.size <= self.limit:
                    self.given[name] = []
            if name in self.given:
                self.given[name].append(mapped(torch.clone, output))

        return hook


class Prefix:
    """A replay's blocks, and what they gave in the reference run.

    Args:
        replay: of states; its model is loaded.

    Attributes:
        reference: the outputs of that run.
        blocks: those that can answer, in order of call; none where answering does not give the same outputs.
    """

    def __init__(self, replay: Replay) -> None:
        self.replay = replay
        self.modules = holding(replay.model.model.diffusion_model, replay.modules)
        free = free_bytes(replay.model.load_device)
        sizes = [sum(state.tensors["x"].numel() for state in batch) for batch in replay.batches]
        self._record = _Recorder(MEMORY_SHARE * free * sizes[0] / sum(sizes))
        with hooked(self._recording()):
            self.reference = [self._recorded(batch) for batch in replay.batches]
        self.blocks = list(self._record.given) if self._regular() else []
        if self.blocks and not self._faithful():
            log.info("HSWQ: blocks of this model cannot be skipped; probing takes longer.")
            self.blocks = []

    def change(self, name: str, made: Delta) -> float:
        """``Replay.change`` with the layer ``name`` alone changed."""
        with self._answering(self._before(name)):
            return self.replay.change(self.reference, {name: lambda: made})

    def _recording(self) -> Iterator[RemovableHandle]:
        for name, module in self.modules.items():
            yield module.register_forward_pre_hook(self._record.enter)
            yield module.register_forward_hook(self._record.leave(name))

    def _recorded(self, batch: list[State]) -> Output:
        self._record.order.append([])
        return self.replay.call(batch)

    def _before(self, layer: str) -> list[str]:
        """Of the blocks called before the layer's own those that can answer."""
        order = self._record.order[0]
        own = next((i for i, block in enumerate(order) if is_in(layer, block)), 0)
        return self.blocks[:own]

    def _regular(self) -> bool:
        """Each block once a call, in the same order in every call."""
        first = self._record.order[0] if self._record.order else []
        return len(set(first)) == len(first) and all(order == first for order in self._record.order)

    def _faithful(self) -> bool:
        """Nothing else than blocks' outputs goes on: with any number of them answering, the outputs are the same."""
        for count in (len(self.blocks) // 2, len(self.blocks)):
            with self._answering(self.blocks[:count]):
                pairs = zip(self.replay.run(), self.reference, strict=True)
                if any(bool((relative_change(*pair) > SAME).any()) for pair in pairs):
                    return False
        return True

    @contextmanager
    def _answering(self, blocks: list[str]) -> Iterator[None]:
        with ExitStack() as stack:
            for name in blocks:
                stack.enter_context(answering(self.modules[name], _in_turn(self._record.given[name])))
            yield


def _in_turn(outputs: list[object]) -> Callable[[], object]:
    """These outputs, one a call, each a copy: what comes behind a block may change its output in place."""
    left = iter(outputs)
    return lambda: mapped(torch.clone, next(left))
