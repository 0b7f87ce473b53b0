"""States: a random sample of model calls, inputs only, from which the model can be run again and anything measured.

A state is one picture's share of one call. Every share that calibration sees draws a random key, and the sample
keeps those of the smallest keys: a uniform sample over all runs, and merging two samples gives the sample one would
have drawn from both.

How they are saved: ``states_file``.
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

# Of pictures of 1024 x 1024 (128 x 128 latents). Smaller ones show each layer fewer rows, and more are kept of them: on
# the reference models, of 16 x 16 latents, 512 gain 0.5 dB over 128 on average of 48 files, -0.6 to 2.3.
DEFAULT_STATES, PICTURE = 128, 128 * 128
MOST_SMALL_STATES = 512
AUTO = -1
MAX_STATES = 4096
# Of one sample, equal tensors counted once. 128 calls of Flux at 1024 x 1024 with 16 prompts take 270 MB.
MAX_BYTES = 2**29
# The argument that holds all sigmas of the run, one tensor for all its calls.
SCHEDULE = "sample_sigmas"
_DIGESTS: MutableMapping[torch.Tensor, str] = WeakTensorKeyDictionary()


@dataclass(frozen=True)
class State:
    """One picture's share of one call.

    Attributes:
        key: random in [0, 1).
        tensors: "x" [1, ...], "sigma" [1], and each further tensor argument by name, on the CPU.
        constants: arguments that are no tensors.
    """

    key: float
    tensors: dict[str, torch.Tensor]
    constants: dict[str, Constant]

    @property
    def mark(self) -> str:
        """Tells states apart: their keys are the same whenever a session of the same name is made again."""
        return _digest(self.tensors["x"])

    @property
    def prompt(self) -> str:
        """The same for all calls of one conditioning."""
        return " ".join(_digest(tensor) for _, tensor in sorted(self.conditioning.items()))

    @property
    def conditioning(self) -> dict[str, torch.Tensor]:
        """The tensors that are neither the picture nor the time."""
        return {name: tensor for name, tensor in self.tensors.items() if name not in ("x", "sigma", SCHEDULE)}

    def cropped(self, side: int) -> State:
        """The middle of its picture, at most ``side`` x ``side`` positions, of all tensors that have its size.

        What is no picture, x of other than four dimensions, stays whole.
        """
        x = self.tensors["x"]
        if x.dim() != 4 or max(x.shape[2:]) <= side:
            return self
        alike = {name for name, tensor in self.tensors.items() if tensor.dim() > 1 and tensor.shape[-2:] == x.shape[2:]}
        return replace(self, tensors={**self.tensors, **{name: _middle(self.tensors[name], side) for name in alike}})

    def arguments(self, device: torch.device | str) -> dict[str, Any]:
        """Everything the model was called with, lists rebuilt, tensors on ``device``."""
        found: dict[str, Any] = dict(self.constants)
        for name in sorted(self.tensors, key=_list_order):
            stem, _, item = name.partition("/")
            tensor = self.tensors[name].to(device)
            if item:
                found.setdefault(stem, []).append(tensor)
            else:
                found[stem] = tensor
        return found


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

    None if an argument cannot be kept (a ControlNet, a function), or if the picture is NaN already.

    Args:
        arguments: "x" [B, ...], "sigma" [B] and others; tensors of batch B are cut to the row, tensors of another
            first dimension are taken whole, None is left out, and lists of tensors are kept item by item.
        whole: names of tensors that have no batch, whatever their length.
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
    """At most ``capacity`` states and ``MAX_BYTES``, those of the smallest keys, in order of key.

    Args:
        capacity: how many to keep; 0 keeps none, AUTO ``DEFAULT_STATES`` or, of pictures smaller than ``PICTURE``, as
            many as have the positions of so many such pictures, but at most ``MOST_SMALL_STATES``.
        ceiling: keys from here on are known not to belong to the whole that this sample will be merged into.
        rng: draws the keys.

    Attributes:
        nbytes: of the tensors, shared ones counted once.
        positions: of the latents, numbers in a channel, over all states.
    """

    def __init__(self, capacity: int, ceiling: float = 1.0, rng: random.Random | None = None) -> None:
        self.capacity, self._ceiling = capacity, ceiling
        self.states: list[State] = []
        self.nbytes = self.positions = 0
        self._users: dict[int, int] = {}  # how often states have the tensor of this id
        self._known: weakref.WeakValueDictionary[str, torch.Tensor] = weakref.WeakValueDictionary()
        self._rng = rng or random.Random()  # noqa: S311 - a sample, no secret

    def emptied(self, ceiling: float = 1.0) -> Sample:
        """A new sample that goes on drawing where this one stopped."""
        return Sample(self.capacity, ceiling, self._rng)

    @property
    def ceiling(self) -> float:
        """Keys from here on do not enter."""
        full = self.states and len(self.states) == self._most
        return self.states[-1].key if full else self._ceiling

    @property
    def _most(self) -> int:
        return MOST_SMALL_STATES if self.capacity == AUTO else self.capacity

    def offer(self, make: Callable[[float], State | None]) -> None:
        """Draw a key; if it belongs to the sample, ``make(key)`` gives the state, or None if it cannot be kept."""
        key = self._rng.random()
        if self.capacity and key < self.ceiling:
            state = make(key)
            if state is not None:
                self.add([state])

    def merge(self, other: Sample) -> None:
        """Add ``other``: the sample one would have drawn from both."""
        self.add(other.states)

    def add(self, states: Iterable[State]) -> None:
        """Insert states that have their keys; what is too much goes, the largest keys first."""
        for state in states:
            if state.key > self._ceiling:  # it would fit in where it is smaller than the one that had to go
                continue
            shared = {name: self._known.setdefault(_digest(tensor), tensor) for name, tensor in state.tensors.items()}
            insort(self.states, replace(state, tensors=shared), key=lambda s: s.key)
            self._count(shared, 1)
        while self._overflows():
            gone = self.states.pop()
            self._count(gone.tensors, -1)
            self._ceiling = min(self._ceiling, gone.key)

    def _count(self, tensors: Mapping[str, torch.Tensor], more: int) -> None:
        """Running sums: a call may offer dozens of states, each of which would have all counted anew."""
        self.positions += more * tensors["x"][:, :1].numel()
        for tensor in tensors.values():
            before = self._users.pop(id(tensor), 0)
            if before + more:
                self._users[id(tensor)] = before + more
            if not before or not before + more:
                self.nbytes += more * tensor.nbytes

    def _overflows(self) -> bool:
        """Fewer states never overflow where more do not, so that merging knows no order."""
        held = len(self.states)
        heavy = held > 1 and self.nbytes > MAX_BYTES
        large = self.capacity == AUTO and held > DEFAULT_STATES and self.positions > DEFAULT_STATES * PICTURE
        return held > self._most or heavy or large


def _digest(tensor: torch.Tensor) -> str:
    """Of a state's tensor, which never changes; once for each, since thousands of states may share a large one."""
    if tensor not in _DIGESTS:
        _DIGESTS[tensor] = _content(tensor)
    return _DIGESTS[tensor]


def _content(tensor: torch.Tensor) -> str:
    content = hashlib.blake2b(tensor.reshape(-1).view(torch.uint8).numpy().data, digest_size=16).hexdigest()
    return f"{content} {tensor.dtype} {tuple(tensor.shape)}"
