"""Validates what a file of recorded calls may pass to a model: each call's arguments, by name and shape."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from ..files.checks import shown

Constant = bool | int | float | str
# Argument names, and the most a state may have: models take ten, a list of reference latents adds a few.
_ARGUMENT = re.compile(r"[^/]{1,100}(/\d{1,3})?", re.ASCII)
MAX_ARGUMENTS = 100
# These are always passed to a model; calibration never records them.
_TAKEN = {"t", "control", "transformer_options"}
# The longest sampler schedule has 1000 steps.
MAX_SCHEDULE = 10_000


def require_arguments(tensors: Mapping[str, torch.Tensor], constants: Mapping[str, object]) -> None:
    """Raise ValueError for names that cannot be arguments, duplicate names, or constants of other types."""
    for name in (*tensors, *constants):
        stem, _, item = name.partition("/")
        twice = item and (stem in tensors or stem in constants)
        if not name.isprintable() or not _ARGUMENT.fullmatch(name) or stem in _TAKEN or twice:
            raise ValueError(f"argument {shown(name)}")
    if set(tensors) & set(constants) or len(tensors) + len(constants) > MAX_ARGUMENTS:
        raise ValueError("an argument twice, or too many of them")
    if not all(isinstance(value, Constant) for value in constants.values()):
        raise ValueError("a constant of another kind")


def require_call(tensors: Mapping[str, torch.Tensor], schedule: torch.Tensor | None) -> None:
    """Raise ValueError unless x is one picture, sigma a single number, and the schedule a vector."""
    x, sigma = tensors.get("x"), tensors.get("sigma")
    if x is None or sigma is None:
        raise ValueError("a state without x and sigma")
    if x.dim() < 2 or len(x) != 1 or not x.numel() or not x.is_floating_point() or sigma.shape != (1,):
        raise ValueError(f"x of shape {tuple(x.shape)} and sigma of shape {tuple(sigma.shape)}")
    if schedule is not None and (schedule.dim() != 1 or len(schedule) > MAX_SCHEDULE):
        raise ValueError(f"a schedule of shape {tuple(schedule.shape)}")
