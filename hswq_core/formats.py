"""The three file formats, one row each: which keys a quantized layer has, and which layers get a scale.

========  ======================================================================================
format    keys of a quantized layer X (all other tensors as in the source)
========  ======================================================================================
v1        ``X.weight`` float8 (unscaled)
v2        ``X.weight`` float8, ``X.scale`` float32 [1]
comfy     Linear: ``X.weight`` float8, ``X.weight_scale`` float32 [], ``X.comfy_quant`` uint8 JSON;
          Conv2d: ``X.weight`` float8 unscaled, or kept where that loses too much (stock ComfyUI has no
          scaled convolution: the scale would be ignored and the picture be noise)
========  ======================================================================================
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .errors import SettingError
from .grid import Grid

# A comfy convolution is stored unscaled only if that costs at most so much SQNR against a scaled one.
# Guess, until the reference models measure it.
UNSCALED_CONV_MAX_LOSS_DB = 6.0


@dataclass(frozen=True)
class FileFormat:
    """One row.

    Attributes:
        name: what users choose and file names end with.
        scaled_kinds: layer kinds stored with a scale.
        may_keep_unscaled: keep a layer in 16 bits where an unscaled cast loses more than
            ``UNSCALED_CONV_MAX_LOSS_DB`` against a scaled one.
        extra_tensors: (grid, scale or None) -> {key suffix: tensor} written beside ``X.weight``.
        opens_in: for the report.
    """

    name: str
    scaled_kinds: frozenset[str]
    may_keep_unscaled: bool
    extra_tensors: Callable[[Grid, torch.Tensor | None], dict[str, torch.Tensor]]
    opens_in: str

    def scaled(self, kind: str) -> bool:
        """Whether a quantized layer of ``kind`` has a scale."""
        return kind in self.scaled_kinds


def _no_extra(_grid: Grid, _scale: torch.Tensor | None) -> dict[str, torch.Tensor]:
    return {}


def _v2_extra(_grid: Grid, scale: torch.Tensor | None) -> dict[str, torch.Tensor]:
    if scale is None:
        return {}
    return {"scale": scale.reshape(1).to(torch.float32)}


def comfy_marker(grid: Grid) -> torch.Tensor:
    """``comfy_quant``: weight-only.

    Without full_precision_matrix_mult a GPU with FP8 compute would cast the activations too, with scale 1 for
    want of a measured input_scale.
    """
    # Without spaces it has 60 bytes, so that the float16 tensors after it in a file still start at even ones.
    text = json.dumps({"format": grid.name, "full_precision_matrix_mult": True}, separators=(",", ":"))
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def _comfy_extra(grid: Grid, scale: torch.Tensor | None) -> dict[str, torch.Tensor]:
    if scale is None:
        return {}
    return {"weight_scale": scale.reshape(()).to(torch.float32), "comfy_quant": comfy_marker(grid)}


FORMATS = {
    row.name: row
    for row in (
        FileFormat("comfy", frozenset({"Linear"}), True, _comfy_extra, "stock Load Checkpoint / Load Diffusion Model"),
        FileFormat("v2", frozenset({"Linear", "Conv2d"}), False, _v2_extra, "HSWQ Loader"),
        FileFormat("v1", frozenset(), False, _no_extra, "any FP8 loader, HSWQ Loader"),
    )
}


def format_named(name: str) -> FileFormat:
    """The row called ``name``; SettingError for any other."""
    if name not in FORMATS:
        raise SettingError("format", got=repr(name), expected=" or ".join(FORMATS), remedy="Choose one of them.")
    return FORMATS[name]
