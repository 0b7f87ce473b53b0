"""Blocks: the outermost modules of a model that are layers or contain some - a residual block of a UNet, a transformer
block, a single Linear - and their outputs, to be returned again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


def holding(root: torch.nn.Module, layers: Iterable[str]) -> dict[str, torch.nn.Module]:
    """The modules below ``root`` that are layers or contain some, by name."""
    parts = (name.split(".") for name in layers)
    names = {".".join(each[:end]) for each in parts for end in range(1, len(each) + 1)}
    return {name: module for name, module in root.named_modules() if name in names}


def is_in(layer: str, block: str) -> bool:
    """Whether a layer is a block or part of it, by their names."""
    return layer == block or layer.startswith(f"{block}.")


@contextmanager
def answering(module: torch.nn.Module, answer: Callable[[], object]) -> Iterator[None]:
    """``module`` returns ``answer()`` instead of running, whatever its arguments."""
    own = module.__dict__.get("forward")
    module.forward = lambda *_args, **_kwargs: answer()
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def tensors_in(tree: object) -> Iterator[torch.Tensor]:
    """Every tensor of an output or of arguments, in order."""
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            yield from tensors_in(item)


def mapped(make: Callable[[Any], object], tree: object, leaf: type | tuple[type, ...] = torch.Tensor) -> object:
    """The same tuples and lists with ``make(item)`` for each item of type ``leaf``, all else unchanged."""
    if isinstance(tree, leaf):
        return make(tree)
    if isinstance(tree, (tuple, list)):
        return type(tree)(mapped(make, item, leaf) for item in tree)
    return tree
