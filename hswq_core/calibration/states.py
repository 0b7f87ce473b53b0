"""States: a random sample of model calls (inputs only), so that the model can be rerun later to measure anything.

A state is one picture's share of one call. Every state that calibration sees draws a random key, and the sample keeps
those with the smallest keys: this is a uniform sample over all runs, and merging two samples gives the sample that
would have been drawn from both.

File format: see ``states_file``.
"""

from __future__ import annotations

import hashlib
import random
import weakref
from bisect import insort
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from .state_checks import Constant

# For pictures of 1024 x 1024 (128 x 128 latents). Smaller ones give each layer fewer rows, so more are kept: on the
# reference models, with 16 x 16 latents, 512 gain 0.5 dB over 128 averaged over 48 files (-0.6 to 2.3).
DEFAULT_STATES, PICTURE = 128, 128 * 128
MOST_SMALL_STATES = 512
AUTO = -1
MAX_STATES = 4096
# Limit for one sample, equal tensors counted once. 128 calls of Flux at 1024 x 1024 with 16 prompts take 270 MB.
MAX_BYTES = 2**29
# The argument with all sigmas of the run, one tensor shared by all its calls.
SCHEDULE = "sample_sigmas"
_DIGESTS: MutableMapping[torch.Tensor, str] = WeakTensorKeyDictionary()


@dataclass(frozen=True)
class State:
    """One picture's share of one call.

    Attributes:
        key: random in [0, 1).
        tensors: "x" [1, ...], "sigma" [1], and all other tensor arguments by name, on the CPU.
        constants: arguments that are not tensors.
    """

    key: float
    tensors: dict[str, torch.Tensor]
    constants: dict[str, Constant]

    @property
    def mark(self) -> str:
        """Identifies the state; its key alone repeats when a session of the same name is recorded again."""
        return _digest(self.tensors["x"])

    @property
    def prompt(self) -> str:
        """Identifies the conditioning; equal for all calls that share it."""
        return " ".join(_digest(tensor) for _, tensor in sorted(self.conditioning.items()))

    @property
    def conditioning(self) -> dict[str, torch.Tensor]:
        """All tensors except picture, sigma and schedule."""
        return {name: tensor for name, tensor in self.tensors.items() if name not in ("x", "sigma", SCHEDULE)}

    def cropped(self, side: int) -> State:
        """Center crop to at most ``side`` x ``side`` positions, of x and all tensors of its spatial size.

        If x is not a picture (not four dimensions), nothing is cropped.
        """
        x = self.tensors["x"]
        if x.dim() != 4 or max(x.shape[2:]) <= side:
            return self
        spatial = {
            name for name, tensor in self.tensors.items() if tensor.dim() > 1 and tensor.shape[-2:] == x.shape[2:]
        }
        return replace(self, tensors={**self.tensors, **{name: _middle(self.tensors[name], side) for name in spatial}})

    def arguments(self, device: torch.device | str) -> dict[str, Any]:
        """All arguments of the model call, with lists rebuilt and tensors on ``device``."""
        arguments: dict[str, Any] = dict(self.constants)
        for name in sorted(self.tensors, key=_list_order):
            stem, _, item = name.partition("/")
            tensor = self.tensors[name].to(device)
            if item:
                arguments.setdefault(stem, []).append(tensor)
            else:
                arguments[stem] = tensor
        return arguments


def _middle(tensor: torch.Tensor, side: int) -> torch.Tensor:
    for dim in (-2, -1):
        length = min(side, tensor.shape[dim])
        tensor = tensor.narrow(dim, (tensor.shape[dim] - length) // 2, length)
    return tensor.contiguous()


def _list_order(name: str) -> tuple[str, int]:
    stem, _, item = name.partition("/")
    return stem, int(item or 0)


def capture(arguments: Mapping[str, Any], row: int, key: float, whole: frozenset[str] = frozenset()) -> State | None:
    """Row ``row`` of a call, copied to the CPU.

    None if an argument cannot be recorded (a ControlNet, a function), or if the picture is not finite.

    Args:
        arguments: "x" [B, ...], "sigma" [B] and others; tensors of batch B are cut to the row, tensors with another
            first dimension are taken whole, None is left out, and lists of tensors are kept item by item.
        whole: names of tensors without a batch dimension, regardless of their length.
    """
    batch = len(arguments["x"])
    tensors: dict[str, torch.Tensor] = {}
    constants: dict[str, Constant] = {}
    for name, value in arguments.items():
        items = {f"{name}/{i}": item for i, item in enumerate(value)} if isinstance(value, list) else {name: value}
        for label, item in items.items():
            if isinstance(item, torch.Tensor):
                cut = item[row : row + 1] if item.dim() and len(item) == batch and name not in whole else item
                tensors[label] = cut.detach().to("cpu", copy=True).contiguous()
            elif isinstance(item, Constant):
                constants[label] = item
            elif item is not None:
                return None
    if not bool(tensors["x"].isfinite().all()):
        return None
    return State(key, tensors, constants)


class Sample:
    """The states with the smallest keys, sorted by key, limited to ``capacity`` and ``MAX_BYTES``.

    Args:
        capacity: how many to keep; 0: none; AUTO: ``DEFAULT_STATES``, or, for pictures smaller than ``PICTURE``, as
            many as add up to the same number of latent positions, up to ``MOST_SMALL_STATES``.
        ceiling: keys from here on are known not to make it into the sample that this one will be merged into.
        rng: draws the keys.

    Attributes:
        nbytes: size of the tensors, shared ones counted once.
        positions: latent positions (values per channel) over all states.
    """

    def __init__(self, capacity: int, ceiling: float = 1.0, rng: random.Random | None = None) -> None:
        self.capacity, self._ceiling = capacity, ceiling
        self.states: list[State] = []
        self.nbytes = self.positions = 0
        self._users: dict[int, int] = {}  # tensor id -> number of states that use it
        self._known: weakref.WeakValueDictionary[str, torch.Tensor] = weakref.WeakValueDictionary()
        self._rng = rng or random.Random()  # noqa: S311 - sampling, not cryptography

    def emptied(self, ceiling: float = 1.0) -> Sample:
        """A new sample that continues this one's sequence of random keys."""
        return Sample(self.capacity, ceiling, self._rng)

    @property
    def ceiling(self) -> float:
        """Keys from here on are not accepted."""
        full = self.states and len(self.states) == self._most
        return self.states[-1].key if full else self._ceiling

    @property
    def _most(self) -> int:
        return MOST_SMALL_STATES if self.capacity == AUTO else self.capacity

    def offer(self, make: Callable[[float], State | None]) -> None:
        """Draw a key; if it is accepted, ``make(key)`` builds the state, or None if it cannot be recorded."""
        key = self._rng.random()
        if self.capacity and key < self.ceiling:
            state = make(key)
            if state is not None:
                self.add([state])

    def merge(self, other: Sample) -> None:
        """Add ``other``; the result is the sample that would have been drawn from both."""
        self.add(other.states)

    def add(self, states: Iterable[State]) -> None:
        """Insert states by their keys, then discard any excess, largest keys first."""
        for state in states:
            if state.key > self._ceiling:  # small states must not get in above a larger one discarded for its size
                continue
            shared = {name: self._known.setdefault(_digest(tensor), tensor) for name, tensor in state.tensors.items()}
            insort(self.states, replace(state, tensors=shared), key=lambda s: s.key)
            self._count(shared, 1)
        while self._overflows():
            discarded = self.states.pop()
            self._count(discarded.tensors, -1)
            self._ceiling = min(self._ceiling, discarded.key)

    def _count(self, tensors: Mapping[str, torch.Tensor], more: int) -> None:
        """Update the running sums: a call may offer dozens of states, and each would require a full recount."""
        self.positions += more * tensors["x"][:, :1].numel()
        for tensor in tensors.values():
            before = self._users.pop(id(tensor), 0)
            if before + more:
                self._users[id(tensor)] = before + more
            if not before or not before + more:
                self.nbytes += more * tensor.nbytes

    def _overflows(self) -> bool:
        """Monotonic: a subset never overflows if the whole does not, so that merging is order-independent."""
        held = len(self.states)
        heavy = held > 1 and self.nbytes > MAX_BYTES
        large = self.capacity == AUTO and held > DEFAULT_STATES and self.positions > DEFAULT_STATES * PICTURE
        return held > self._most or heavy or large


def _digest(tensor: torch.Tensor) -> str:
    """Cached digest of a state's tensor, which never changes; thousands of states may share a large one."""
    if tensor not in _DIGESTS:
        _DIGESTS[tensor] = _content(tensor)
    return _DIGESTS[tensor]


def _content(tensor: torch.Tensor) -> str:
    content = hashlib.blake2b(tensor.reshape(-1).view(torch.uint8).numpy().data, digest_size=16).hexdigest()
    return f"{content} {tensor.dtype} {tuple(tensor.shape)}"
