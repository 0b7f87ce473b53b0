"""Blocks that run before a changed layer cannot have changed: they return cached outputs.

Probing changes one layer at a time; on average half of a call runs before that layer.
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

# Share of the free memory for cached outputs.
MEMORY_SHARE = 0.2
# Up to this squared relative change outputs count as the same: a GPU's order of operations varies.
SAME = 1e-10


@dataclass
class _Recorder:
    """Outputs of the outermost modules, call by call.

    Attributes:
        limit: bytes that the outputs of the first batch may take; blocks beyond that are not cached.
        given: {block: its outputs, one per batch}, in call order.
        order: blocks of each batch, in call order.
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
    """A replay's blocks, and their outputs in the reference run.

    Args:
        replay: of states; its model is loaded.

    Attributes:
        reference: the outputs of that run.
        blocks: those with cached outputs, in call order; none if using these changes the model's output.
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
        """``Replay.change`` with only the layer ``name`` changed."""
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
        """The blocks with cached outputs that are called before the layer's own."""
        order = self._record.order[0]
        own = next((i for i, block in enumerate(order) if is_in(layer, block)), 0)
        return self.blocks[:own]

    def _regular(self) -> bool:
        """Whether every call runs each block once, in the same order."""
        first = self._record.order[0] if self._record.order else []
        return len(set(first)) == len(first) and all(order == first for order in self._record.order)

    def _faithful(self) -> bool:
        """Whether blocks pass on only their outputs: with half or all of these cached, the model's stay the same."""
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
    """These outputs, one per call, each a copy: what follows a block may change its output in place."""
    remaining = iter(outputs)
    return lambda: mapped(torch.clone, next(remaining))
