"""A MODEL run again on recorded states, watched or changed layer by layer through hooks.

Weights are never touched: what a rounded weight would change is added to its layer's output. So it makes no
difference whether ComfyUI holds a weight in VRAM, streams it, or adds a LoRA to it on the way.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import comfy.model_management
import torch

from ...hswq_core.calibration.states import SCHEDULE, State
from ...hswq_core.model.kinds import kind_of
from ..model import layer_modules

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from ..comfyui.types import ModelPatcher

# Latent elements that run as one batch: one picture of 1024 x 1024 with 16 channels. Guess.
BATCH_ELEMENTS = 2**18
# Tensors that do not belong to one picture and are the same for every call of a schedule.
_SHARED = (SCHEDULE,)


@dataclass(frozen=True)
class Delta:
    """What rounding changes in a layer.

    Attributes:
        weight: Ŵ - W.
        bias: the corrected bias minus the bias.
        rounded, cast: for a Linear that multiplies in 8 bits, Ŵ and the cast of its inputs.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    rounded: torch.Tensor | None = None
    cast: Callable[[torch.Tensor], torch.Tensor] | None = None


@dataclass(frozen=True)
class Output:
    """What a call removed: the denoised latents of a batch and the inputs they came from, [n, ...]."""

    x: torch.Tensor
    denoised: torch.Tensor


class Replay:
    """The states of a session, ready to be run on a MODEL.

    Args:
        model: a ModelPatcher; its patches apply, its wrappers do not.

    Attributes:
        batches: the states of each call, in the order of ``run``.
    """

    def __init__(self, model: ModelPatcher, states: Sequence[State]) -> None:
        self.model = model
        self.modules = layer_modules(model.model.diffusion_model)
        self.batches = [list(group) for group in _batched(states)]

    @contextmanager
    def loaded(self, room: float = 0.0) -> Iterator[None]:
        """The model loaded as ComfyUI wants it for sampling, while the context lasts.

        Cancel is checked at each layer: one call of a large model may take a minute.

        Args:
            room: bytes of the device to leave free besides what calls need; a model that does not fit is streamed.
        """
        comfy.model_management.load_models_gpu([self.model], memory_required=room)
        self.model.pre_run()
        try:
            with hooked(self.modules[name].register_forward_pre_hook(_cancelling) for name in self.modules):
                yield
        finally:
            self.model.cleanup()

    def run(self) -> list[Output]:
        """Every state once, in order."""
        return [self.call(batch) for batch in self.batches]

    def change(self, reference: list[Output], deltas: Mapping[str, Callable[[], Delta]]) -> float:
        """Mean over states of ||got - wanted||² / ||x - wanted||² with these layers rounded.

        deltas: made when their layer runs and dropped right after, so that memory never holds a whole model's.
        """
        with self.rounded(deltas):
            parts = [relative_change(got, wanted) for got, wanted in zip(self.run(), reference, strict=True)]
        return float(torch.cat(parts).mean())

    @contextmanager
    def rounded(self, deltas: Mapping[str, Callable[[], Delta]]) -> Iterator[None]:
        """The layers in ``deltas`` return what their rounded weights would."""
        with hooked(self.modules[name].register_forward_hook(_adding(make)) for name, make in deltas.items()):
            yield

    def watch(self, see: Mapping[str, Callable[[torch.Tensor], None]], *, last: str | None = None) -> None:
        """Every state once; ``see[name]`` is called with each input of layer ``name``.

        Args:
            last: the layer at which calls are aborted; None: they run in full.
        """
        for batch in self.batches:
            self.watch_call(batch, see, last)

    def watch_call(
        self, batch: list[State], see: Mapping[str, Callable[[torch.Tensor], None]], last: str | None
    ) -> None:
        """One of ``batches``; see ``watch``."""

        def hook(name: str) -> Callable[..., None]:
            def seen(_module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
                see[name](args[0])
                if name == last:
                    raise _SeenAllError

            return seen

        with hooked(self.modules[name].register_forward_pre_hook(hook(name)) for name in see), suppress(_SeenAllError):
            self.call(batch)

    def call(self, states: list[State]) -> Output:
        """One of ``batches``."""
        device = self.model.load_device
        each = [state.arguments(device) for state in states]
        arguments = {name: _joined(name, [one[name] for one in each]) for name in each[0]}
        x, sigma = arguments.pop("x"), arguments.pop("sigma")
        own = {name: arguments.pop(name) for name in _SHARED if name in arguments}
        patches = dict(self.model.model_options.get("transformer_options", {}))
        options = {**patches, **own, "sigmas": sigma, "cond_or_uncond": [0]}
        return Output(x, self.model.model.apply_model(x, sigma, transformer_options=options, **arguments))


class _SeenAllError(Exception):
    """Aborts a call whose rest is not needed."""


def _cancelling(_module: torch.nn.Module, _args: object) -> None:
    comfy.model_management.throw_exception_if_processing_interrupted()


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Hooks that are removed on exit; ``handles`` may register them as it is iterated."""
    with ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        yield


def relative_change(got: Output, wanted: Output) -> torch.Tensor:
    """[n] squared change of each state's output, relative to what the call removed."""
    change = (got.denoised - wanted.denoised).float().square().flatten(1).sum(1)
    removed = (wanted.x - wanted.denoised).float().square().flatten(1).sum(1)
    return (change / removed.clamp(min=torch.finfo(torch.float32).tiny)).cpu()


def _adding(make: Callable[[], Delta]) -> Callable[..., torch.Tensor]:
    def hook(module: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        x, delta = args[0], make()
        apply = partial(kind_of(module).apply, module)
        bias = None if delta.bias is None else delta.bias.to(x.device, x.dtype)
        changed = output + apply(x, delta.weight.to(x.device, x.dtype), bias)
        if delta.cast is None or delta.rounded is None:
            return changed
        return changed + apply(delta.cast(x) - x, delta.rounded.to(x.device, x.dtype), None)

    return hook


def _batched(states: Sequence[State]) -> Iterator[list[State]]:
    """Batches of states that fit one call: same names, shapes and constants, not too large together."""
    for _, alike in itertools.groupby(sorted(states, key=_likeness), key=_likeness):
        group = list(alike)
        size = max(1, BATCH_ELEMENTS // group[0].tensors["x"].numel())
        for start in range(0, len(group), size):
            yield group[start : start + size]


def _likeness(state: State) -> str:
    shapes = {name: tuple(tensor.shape) for name, tensor in state.tensors.items()}
    shared = {name: state.tensors[name].tolist() for name in _SHARED if name in state.tensors}
    return repr((sorted(shapes.items()), sorted(state.constants.items()), shared))


def _joined(name: str, values: list[Any]) -> Any:
    """Arguments of several states as those of one call."""
    first = values[0]
    if isinstance(first, list):
        return [torch.cat(items) for items in zip(*values, strict=True)]
    if isinstance(first, torch.Tensor) and name not in _SHARED and first.dim():
        return torch.cat(values)
    return first
