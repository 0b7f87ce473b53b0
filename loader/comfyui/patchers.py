"""The internals of a ModelPatcher that the pack needs. Seen in ComfyUI 0.18.2, 0.24.1 and 0.30.0."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from comfy.patcher_extension import WrappersMP

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

    PatcherBase = ModelPatcher
else:
    PatcherBase = object  # what a mixin is mixed into brings all that

_COMPILE_KEY, _COMPILE_OPTIONS = "torch.compile", "torch_compile_kwargs"
_classes: dict[tuple[type, type], type] = {}


def mixed(patcher: ModelPatcher, mixin: type) -> ModelPatcher:
    """The same object with the methods of ``mixin`` before those of its class; ``patcher.mixin`` says which it was.

    By its ``__class__``: ComfyUI makes patchers itself, of several classes, and has no place to name another one. If
    one of its classes got ``__slots__`` or a different layout, this would raise TypeError.
    """
    kind = type(patcher)
    members = {"mixin": mixin, "__module__": mixin.__module__}
    name = f"{mixin.__name__}{kind.__name__}"
    patcher.__class__ = _classes.setdefault((mixin, kind), type(name, (mixin, kind), members))
    return patcher


def reopened_by(patcher: ModelPatcher, reopen: Callable[..., ModelPatcher], *arguments: object) -> None:
    """Let ComfyUI call ``reopen(*arguments)`` where it needs the model again: torch.compile, hooks, several GPUs.

    If ComfyUI no longer read ``cached_patcher_init``, those would end in its RuntimeError.
    """
    patcher.cached_patcher_init = (reopen, arguments)


def count_as_loaded(patcher: ModelPatcher, size: int) -> None:
    """Add ``size`` bytes to what ComfyUI counts as the model's memory on its device.

    Without ``model_loaded_weight_memory`` this raises AttributeError when a LoRA is loaded.
    """
    patcher.model.model_loaded_weight_memory += size


def is_compiled(patcher: ModelPatcher) -> bool:
    """Whether ComfyUI's or another pack's node has put torch.compile on the model.

    ``comfy_api.torch_helpers`` writes both names. If it wrote others, a compiled model would not be noticed, and none
    of its layers observed.
    """
    options = patcher.model_options
    own = patcher.wrappers.get(WrappersMP.APPLY_MODEL, {})
    in_options = options.get("transformer_options", {}).get("wrappers", {}).get(WrappersMP.APPLY_MODEL, {})
    return _COMPILE_KEY in own or _COMPILE_KEY in in_options or _COMPILE_OPTIONS in options


def arguments_of(patcher: ModelPatcher) -> tuple[object, ...]:
    """The arguments ComfyUI would open the model with again: for its loaders and ours the file's path comes first.

    Empty for a model made in memory. Without ``cached_patcher_init`` every model would pass for one, and its tensors
    would be taken from memory.
    """
    init = getattr(patcher, "cached_patcher_init", None)
    return tuple(init[1]) if init and init[1] else ()
