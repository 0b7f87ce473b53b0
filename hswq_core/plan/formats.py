"""The file formats, one row each: the schemes they store layers in, and the keys of a quantized layer.

========  ======================================================================================
format    keys of a quantized layer X (all other tensors as in the source)
========  ======================================================================================
v1        ``X.weight`` float8 (unscaled)
v2        ``X.weight`` float8, ``X.scale`` float32 [1], or per channel [out]; other schemes as in comfy
comfy     Linear: ``X.weight`` float8, ``X.weight_scale`` float32 [], ``X.comfy_quant`` uint8 JSON, and
          ``X.input_scale`` float32 [] if activations may be cast too;
          Conv2d: ``X.weight`` float8 unscaled, or kept if that loses too much (stock ComfyUI has no scaled
          convolution: it would ignore the scale and the picture would be noise)
========  ======================================================================================
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..errors import SettingError
from ..files.checks import checked, parse_json
from ..model.families import Family
from ..quant.grid import FLOAT8_E4M3FN
from ..quant.schemes.fp8 import Fp8, Fp8Cast, Fp8Channel
from ..quant.schemes.scheme import CODES, SCALE, Scheme, Tensors
from ..quant.schemes.table import SCHEMES, scheme_named

# A comfy convolution is stored unscaled only if that costs at most this much SQNR compared with a scaled one.
# A guess, until measured on the reference models.
UNSCALED_CONV_MAX_LOSS_DB = 6.0

# Real ones take up to 200.
MAX_MARKER_BYTES = 4096
INPUT_SCALE, MARKER = "input_scale", "comfy_quant"
# After "X.": ours and stock, legacy stock; then V2, also the original project's, which ComfyUI's loaders do not read.
V2_SCALE = "scale"
STOCK_SCALES, V2_SCALES = (SCALE, "scale_weight"), (V2_SCALE, "weight.scale")
SCALE_SUFFIXES = (*STOCK_SCALES, *V2_SCALES)

# (scheme, its tensors, input scale or None) -> the tensors under their names in a file, after "X.".
Spelling = Callable[[Scheme, Tensors, torch.Tensor | None], Tensors]


@dataclass(frozen=True)
class FileFormat:
    """One row.

    Attributes:
        name: the user-visible name, which file names end with.
        schemes: {layer kind: names of allowed schemes}; the first is the default.
        spelled: makes the stored tensors of a quantized layer.
        opens_in: for the report.
        own_loader: whether only HSWQ Loader reads it; else ComfyUI's loaders do too.
        all_scaled: whether every quantized layer has a scale.
        max_loss_db: keep a layer in 16 bits if its scheme loses more SQNR than this relative to its
            ``judged_against``.
        casts_kept: whether stock loaders cast kept layers to FP8 too, on cards with FP8 compute.
        fast_matmul: whether it can tell loaders to multiply in 8 bits.
    """

    name: str
    schemes: Mapping[str, tuple[str, ...]]
    spelled: Spelling
    opens_in: str
    own_loader: bool = False
    all_scaled: bool = False
    max_loss_db: float = math.inf
    casts_kept: bool = False
    fast_matmul: bool = False

    def usual(self, kind: str) -> Scheme:
        """The default scheme for layers of ``kind``."""
        return scheme_named(self.schemes[kind][0])

    def scheme(self, kind: str, granularity: str) -> Scheme | None:
        """The scheme for layers of ``kind`` with scales of this granularity; None: the format has none.

        Schemes without a scale match any granularity.
        """
        rows = map(scheme_named, self.schemes[kind])
        return next((row for row in rows if not row.scaled or row.granularity == granularity), None)

    def stock_since(self, schemes: Iterable[str]) -> str:
        """Oldest ComfyUI release whose own loaders open a file with these schemes; "" if none does."""
        known = [SCHEMES.get(name) for name in schemes]
        releases = ["" if scheme is None else scheme.stock_since for scheme in known]
        if self.own_loader or "" in releases:
            return ""
        return max(releases, key=lambda release: tuple(map(int, release.split("."))), default="")

    def scaled_kinds(self) -> frozenset[str]:
        """Kinds whose layers have a scale by default."""
        return frozenset(kind for kind in self.schemes if self.usual(kind).scaled)


def comfy_marker(record: Mapping[str, object]) -> torch.Tensor:
    """``comfy_quant``: JSON as uint8, see ``Scheme.marker``.

    Without full_precision_matrix_mult, GPUs with FP8 compute cast the activations too, with scale 1 if there is no
    measured input_scale.
    """
    text = json.dumps(record, separators=(",", ":"))
    # 60 or 64 bytes, so that the float16 and float32 tensors after it in a file stay aligned.
    text += " " * (-len(text) % 4)
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def marker_record(marker: torch.Tensor) -> dict[str, Any]:
    """Parse a ``comfy_quant`` written by any tool; it has at least ``format``. Raises ValueError for anything else."""
    if marker.dtype != torch.uint8 or marker.numel() > MAX_MARKER_BYTES:
        raise ValueError(f"{marker.numel()} values of {marker.dtype}")
    record = checked(parse_json(str(bytes(marker.flatten().tolist()), "utf-8")), dict)
    if "format" not in record:
        raise ValueError("no format")
    return record


def usable(scales: torch.Tensor) -> torch.Tensor:
    """Which scales are finite and > 0; any other gives a black picture."""
    return scales.isfinite() & (scales > 0)


def _codes_only(_scheme: Scheme, tensors: Tensors, _input_scale: torch.Tensor | None) -> Tensors:
    return {CODES: tensors[CODES]}


def _as_comfy(scheme: Scheme, tensors: Tensors, input_scale: torch.Tensor | None) -> Tensors:
    record = scheme.marker(full_precision=input_scale is None)
    if record is None:
        return dict(tensors)
    inputs = {} if input_scale is None else {INPUT_SCALE: input_scale}
    return {**tensors, **inputs, MARKER: comfy_marker(record)}


def _as_v2(scheme: Scheme, tensors: Tensors, input_scale: torch.Tensor | None) -> Tensors:
    if scheme.number_format != FLOAT8_E4M3FN.name:
        return _as_comfy(scheme, tensors, input_scale)
    scale = {V2_SCALE: tensors[SCALE].reshape(-1)} if scheme.scaled else {}
    return {CODES: tensors[CODES], **scale}


_CAST, _SCALED = (Fp8Cast.name,), (Fp8.name, Fp8Channel.name)
FORMATS = {
    row.name: row
    for row in (
        FileFormat(
            "comfy",
            {"Linear": (Fp8.name,), "Conv2d": _CAST},
            _as_comfy,
            "stock Load Checkpoint / Load Diffusion Model",
            max_loss_db=UNSCALED_CONV_MAX_LOSS_DB,
            fast_matmul=True,
        ),
        FileFormat(
            "v2", {"Linear": _SCALED, "Conv2d": _SCALED}, _as_v2, "HSWQ Loader", own_loader=True, all_scaled=True
        ),
        FileFormat(
            "v1", {"Linear": _CAST, "Conv2d": _CAST}, _codes_only, "any FP8 loader, HSWQ Loader", casts_kept=True
        ),
    )
}


def format_named(name: str) -> FileFormat:
    """The row called ``name``; SettingError for any other."""
    if name not in FORMATS:
        raise SettingError("format", got=repr(name), expected=" or ".join(FORMATS), remedy="Choose one of them.")
    return FORMATS[name]


def format_for(row: FileFormat, family: Family) -> FileFormat:
    """A format as loaders of the family read it.

    Raises:
        SettingError: none of them opens it.
    """
    if not family.text_encoder:
        return row
    if row.own_loader:
        raise SettingError(
            "format",
            got=f"{row.name} for a text encoder ({family.name})",
            expected="comfy or v1",
            remedy="Choose comfy: HSWQ Loader opens diffusion models, ComfyUI's Load CLIP opens text encoders.",
        )
    schemes = row.schemes if family.stock_scales else dict.fromkeys(row.schemes, _CAST)
    return replace(row, schemes=schemes, opens_in="stock Load CLIP", casts_kept=False)
