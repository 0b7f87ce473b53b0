"""Calls resumed where they stopped: watching a group of layers begins at the block in which the last group ended.

Otherwise every call would run all blocks before a group again, half of a call on average, and a large model has dozens
of groups. For each call, the arguments of that block are kept, and of the outputs of earlier blocks those that the
model's own code still holds by then, such as a UNet's skips, and small ones, such as embeddings: only these can matter
later on. All other earlier outputs are replaced by NaN. Whether that holds for a model is checked each time: one call
also runs in full and must show the layers the same inputs; if not, all calls run from the start.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch

from ...hswq_core.calibration.states import State
from ...hswq_core.devices import CPU
from ..devices import free_bytes
from .blocks import answering, holding, is_in, mapped, tensors_in
from .replay import Replay, hooked

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.utils.hooks import RemovableHandle

    from ..comfyui.types import ModelPatcher

log = logging.getLogger(__name__)

# Share of the free RAM for what is kept between groups; calls beyond it run from the start.
MEMORY_SHARE = 0.2
# Output tensors of up to this many bytes are always kept: the model may have dropped one after deriving another.
SMALL = 2**20
# Up to this relative difference sums and norms of inputs count as the same: a GPU's order of operations varies.
SAME = 1e-3

See = Mapping[str, Callable[[torch.Tensor], None]]
Shown = dict[str, list[torch.Tensor]]


@dataclass(frozen=True)
class _Gone:
    """A tensor nobody will read."""

    shape: torch.Size
    dtype: torch.dtype


@dataclass(frozen=True)
class _Kept:
    """What a call needs to resume.

    Attributes:
        front: the block to resume at; "": the call runs from the start.
        given: that block's arguments by position or name, tensors on the CPU.
        answers: {block before it: its output, tensors on the CPU or ``_Gone``}.
    """

    front: str = ""
    given: dict[int | str, object] = field(default_factory=dict)
    answers: dict[str, object] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Size of the tensors."""
        return sum(tensor.nbytes for tensor in tensors_in([*self.given.values(), *self.answers.values()]))


BEGINNING = _Kept()


class Relay(Replay):
    """A replay whose ``watch`` resumes where it stopped; for layers before that, it starts over."""

    @classmethod
    def of(cls, replay: Replay) -> Relay:
        """The same states on the same model."""
        return cls(replay.model, [state for batch in replay.batches for state in batch])

    def __init__(self, model: ModelPatcher, states: Sequence[State]) -> None:
        super().__init__(model, states)
        self._blocks = holding(self.model.model.diffusion_model, self.modules)
        self._limit = MEMORY_SHARE * free_bytes(CPU)
        self._kept = [BEGINNING] * len(self.batches)
        # A single call would run twice.
        self._works = len(self.batches) > 1
        # The smallest call is the one to check that with.
        self._judge = min(range(len(self.batches)), key=lambda i: len(self.batches[i]))

    def watch(self, see: See, *, last: str | None = None) -> None:
        """As ``Replay.watch``."""
        if last is None or not self._works:
            super().watch(see, last=last)
            return
        if any(is_in(name, block) for name in see for block in self._kept[self._judge].answers):
            self._kept = [BEGINNING] * len(self.batches)
        front = self._judged(see, last)
        room = self._limit
        for i, batch in enumerate(self.batches):
            if i != self._judge:
                self._kept[i] = self._watched(batch, self._kept[i], front if room > 0 else "", see, last).kept
            room -= self._kept[i].nbytes

    def _watched(self, batch: list[State], kept: _Kept, front: str, see: See, last: str) -> _Call:
        call = _Call(kept, front, self.model.load_device)
        with call.followed(self._blocks):
            self.watch_call(batch, see, last)
        return call

    def _judged(self, see: See, last: str) -> str:
        """Run one call both in full and resumed; returns the block that holds layer ``last``, "" if they differ."""
        batch, kept = self.batches[self._judge], self._kept[self._judge]
        whole: Shown = {}
        short: Shown = {}
        full = self._watched(batch, BEGINNING, "", _noting(whole, see), last)
        resumed = self._watched(batch, kept, full.inside, _noting(short, dict.fromkeys(see, _ignored)), last)
        self._kept[self._judge] = resumed.kept
        self._works = full.regular and resumed.kept is not BEGINNING and _alike(whole, short)
        if self._works:
            return full.inside
        log.info("HSWQ: blocks of this model cannot be skipped; watching takes longer.")
        self._kept = [BEGINNING] * len(self.batches)
        return ""


class _Call:
    """One call of the model, followed from block to block.

    Args:
        kept: where it resumes.
        front: the block for which to keep what resuming there needs; "": keep nothing.
        device: where the model computes.

    Attributes:
        kept: what was kept; ``BEGINNING`` if the block was not reached.
        inside: the block now running.
        regular: whether no block ran twice.
    """

    def __init__(self, kept: _Kept, front: str, device: torch.device) -> None:
        self._from, self._front, self._device = kept, front, device
        self.kept, self.inside, self.regular = BEGINNING, "", True
        self._depth = 0
        # {block that ran: its output, each tensor as a ``_Seen``}.
        self._outputs: dict[str, object] = {}

    @contextmanager
    def followed(self, blocks: Mapping[str, torch.nn.Module]) -> Iterator[None]:
        """Follow all blocks; those before the one to resume at return what was kept."""
        with ExitStack() as stack:
            for name, answer in self._from.answers.items():
                stack.enter_context(answering(blocks[name], partial(self._answer, answer)))
            stack.enter_context(hooked(self._hooks(blocks)))
            yield

    def _hooks(self, blocks: Mapping[str, torch.nn.Module]) -> Iterator[RemovableHandle]:
        for name, module in blocks.items():
            yield module.register_forward_pre_hook(partial(self._enter, name), with_kwargs=True)
            yield module.register_forward_hook(partial(self._leave, name))

    def _enter(
        self, name: str, _module: torch.nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> tuple[tuple[object, ...], dict[str, object]] | None:
        self._depth += 1
        if self._depth > 1:
            return None
        self.inside = name
        self.regular &= name not in self._outputs
        if name == self._from.front:
            given = self._from.given
            args = tuple(self._put(value, given.get(place)) for place, value in enumerate(args))
            kwargs = {key: self._put(value, given.get(key)) for key, value in kwargs.items()}
        if name == self._front:
            outputs = {block: mapped(_Seen.now, output, _Seen) for block, output in self._outputs.items()}
            places: list[tuple[int | str, object]] = [*enumerate(args), *kwargs.items()]
            self.kept = _Kept(name, {place: mapped(_to_cpu, value) for place, value in places}, outputs)
        return args, kwargs

    def _leave(self, name: str, _module: torch.nn.Module, _args: object, output: object) -> None:
        self._depth -= 1
        if not self._depth:
            self._outputs[name] = mapped(_Seen, output)

    def _answer(self, kept: object) -> object:
        return mapped(partial(_back, device=self._device), kept, (torch.Tensor, _Gone))

    def _put(self, value: object, kept: object) -> object:
        """An argument with its tensors replaced by the kept ones; the rest is this call's own."""
        if isinstance(value, torch.Tensor) and isinstance(kept, torch.Tensor):
            return _back(kept, self._device)
        if isinstance(value, (tuple, list)) and isinstance(kept, (tuple, list)) and len(value) == len(kept):
            return type(value)(map(self._put, value, kept))
        return value


class _Seen:
    """A tensor that a block returned: read again later, if it is still alive."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._there = weakref.ref(tensor)
        self._small = _to_cpu(tensor) if tensor.nbytes <= SMALL else _Gone(tensor.shape, tensor.dtype)

    def now(self) -> torch.Tensor | _Gone:
        """The tensor as it is now; if it has died, as it was if small, else ``_Gone``."""
        tensor = self._there()
        return self._small if tensor is None else _to_cpu(tensor)


def _to_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """A copy, since the model may change its tensors in place."""
    return tensor.detach().to(CPU, copy=True)


def _back(kept: torch.Tensor | _Gone, device: torch.device) -> torch.Tensor:
    """A copy of what was kept; NaN, or 0 for integers, in place of what is gone."""
    if isinstance(kept, torch.Tensor):
        return kept.to(device, copy=True)
    return torch.full(kept.shape, torch.nan if kept.dtype.is_floating_point else 0, dtype=kept.dtype, device=device)


def _ignored(_x: torch.Tensor) -> None:
    pass


def _noting(shown: Shown, see: See) -> See:
    """``see``, recording norm and scaled sum of each input."""

    def noted(name: str) -> Callable[[torch.Tensor], None]:
        def note(x: torch.Tensor) -> None:
            total = x.sum(dtype=torch.float32) / max(1, x.numel()) ** 0.5
            shown.setdefault(name, []).append(torch.stack([x.float().norm(), total]).cpu())
            see[name](x)

        return note

    return {name: noted(name) for name in see}


def _alike(a: Shown, b: Shown) -> bool:
    """Whether two calls showed the same layers the same inputs; NaN never equals anything."""
    if {name: len(shown) for name, shown in a.items()} != {name: len(shown) for name, shown in b.items()}:
        return False
    pairs = ((x, y) for name in a for x, y in zip(a[name], b[name], strict=True))
    return all(bool(((x - y).abs() <= SAME * x[0]).all()) for x, y in pairs)
