"""The three file formats, one row each: which keys a quantized layer has, and which layers get a scale.

========  ======================================================================================
format    keys of a quantized layer X (all other tensors as in the source)
========  ======================================================================================
v1        ``X.weight`` float8 (unscaled)
v2        ``X.weight`` float8, ``X.scale`` float32 [1], or one a channel [out]
comfy     Linear: ``X.weight`` float8, ``X.weight_scale`` float32 [], ``X.comfy_quant`` uint8 JSON, and
          ``X.input_scale`` float32 [] where activations may be cast too;
          Conv2d: ``X.weight`` float8 unscaled, or kept where that loses too much (stock ComfyUI has no
          scaled convolution: the scale would be ignored and the picture be noise)
========  ======================================================================================
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..errors import SettingError
from ..files.checks import checked, parse_json
from ..model.families import Family
from ..quant.grid import Grid

# A comfy convolution is stored unscaled only if that costs at most so much SQNR against a scaled one.
# Guess, until the reference models measure it.
UNSCALED_CONV_MAX_LOSS_DB = 6.0

# Those in use have up to 200.
MAX_MARKER_BYTES = 4096

# What one scale serves.
TENSOR, CHANNEL = "tensor", "channel"
GRANULARITIES = (TENSOR, CHANNEL)


@dataclass(frozen=True)
class FileFormat:
    """One row.

    Attributes:
        name: what users choose and file names end with.
        scaled_kinds: layer kinds stored with a scale.
        may_keep_unscaled: keep a layer in 16 bits where an unscaled cast loses more than
            ``UNSCALED_CONV_MAX_LOSS_DB`` against a scaled one.
        extra_tensors: (grid, scale or None, input scale or None) -> {key suffix: tensor} written beside ``X.weight``.
        opens_in: for the report.
        granularities: what one scale may serve: a whole "tensor", or an output "channel".
        fast_matmul: whether it can tell a loader to multiply in 8 bits.
    """

    name: str
    scaled_kinds: frozenset[str]
    may_keep_unscaled: bool
    extra_tensors: Callable[[Grid, torch.Tensor | None, torch.Tensor | None], dict[str, torch.Tensor]]
    opens_in: str
    granularities: tuple[str, ...] = (TENSOR,)
    fast_matmul: bool = False

    def scaled(self, kind: str) -> bool:
        """Whether a quantized layer of ``kind`` has a scale."""
        return kind in self.scaled_kinds


def _no_extra(_grid: Grid, _scale: torch.Tensor | None, _input_scale: torch.Tensor | None) -> dict[str, torch.Tensor]:
    return {}


def _v2_extra(_grid: Grid, scale: torch.Tensor | None, _input_scale: torch.Tensor | None) -> dict[str, torch.Tensor]:
    if scale is None:
        return {}
    return {"scale": scale.reshape(-1).to(torch.float32)}


def comfy_marker(grid: Grid, *, full_precision: bool = True) -> torch.Tensor:
    """``comfy_quant``: weight-only, unless told otherwise.

    Without full_precision_matrix_mult a GPU with FP8 compute casts the activations too, with scale 1 for want of a
    measured input_scale.
    """
    text = json.dumps({"format": grid.name, "full_precision_matrix_mult": full_precision}, separators=(",", ":"))
    # 60 or 64 bytes, so that the float16 and float32 tensors after it in a file still start where they must.
    text += " " * (-len(text) % 4)
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def marker_record(marker: torch.Tensor) -> dict[str, Any]:
    """What a ``comfy_quant`` says, by whomever: at least a ``format``. Raises ValueError for anything else."""
    if marker.dtype != torch.uint8 or marker.numel() > MAX_MARKER_BYTES:
        raise ValueError(f"{marker.numel()} values of {marker.dtype}")
    record = checked(parse_json(str(bytes(marker.flatten().tolist()), "utf-8")), dict)
    if "format" not in record:
        raise ValueError("no format")
    return record


def _comfy_extra(grid: Grid, scale: torch.Tensor | None, input_scale: torch.Tensor | None) -> dict[str, torch.Tensor]:
    if scale is None:
        return {}
    found = {"weight_scale": scale.reshape(()).to(torch.float32)}
    if input_scale is not None:
        found["input_scale"] = input_scale.reshape(()).to(torch.float32)
    return found | {"comfy_quant": comfy_marker(grid, full_precision=input_scale is None)}


FORMATS = {
    row.name: row
    for row in (
        FileFormat(
            "comfy",
            frozenset({"Linear"}),
            True,
            _comfy_extra,
            "stock Load Checkpoint / Load Diffusion Model",
            fast_matmul=True,
        ),
        FileFormat("v2", frozenset({"Linear", "Conv2d"}), False, _v2_extra, "HSWQ Loader", (TENSOR, CHANNEL)),
        FileFormat("v1", frozenset(), False, _no_extra, "any FP8 loader, HSWQ Loader"),
    )
}


def format_named(name: str) -> FileFormat:
    """The row called ``name``; SettingError for any other."""
    if name not in FORMATS:
        raise SettingError("format", got=repr(name), expected=" or ".join(FORMATS), remedy="Choose one of them.")
    return FORMATS[name]


def format_for(row: FileFormat, family: Family) -> FileFormat:
    """A format as the loaders of a family read it.

    Raises:
        SettingError: none of them opens it.
    """
    if not family.text_encoder:
        return row
    if row.name == "v2":
        raise SettingError(
            "format",
            got=f"{row.name} for a text encoder ({family.name})",
            expected="comfy or v1",
            remedy="Choose comfy: HSWQ Loader opens diffusion models, ComfyUI's Load CLIP opens text encoders.",
        )
    kinds = row.scaled_kinds if family.stock_scales else frozenset()
    return replace(row, scaled_kinds=kinds, opens_in="stock Load CLIP")


# After "X.": ours and stock, legacy stock; and V2's, the original project's too, which ComfyUI's loaders do not read.
STOCK_SCALES, V2_SCALES = ("weight_scale", "scale_weight"), ("scale", "weight.scale")


SCALE_SUFFIXES = (*STOCK_SCALES, *V2_SCALES)


def usable(scales: torch.Tensor) -> torch.Tensor:
    """Which scales are finite and above 0: any other draws a black picture."""
    return scales.isfinite() & (scales > 0)
