"""Table of all schemes, by name."""

from __future__ import annotations

import torch

from ...errors import SettingError
from ..grid import FLOAT8_DTYPES
from .fp8 import Fp8, Fp8Cast, Fp8Channel
from .scheme import CHANNEL, TENSOR, Scheme

SCHEMES: dict[str, Scheme] = {row.name: row for row in (Fp8(), Fp8Channel(), Fp8Cast())}


def scheme_named(name: str) -> Scheme:
    """The row called ``name``; SettingError for any other."""
    if name not in SCHEMES:
        raise SettingError("scheme", got=repr(name), expected=" or ".join(SCHEMES), remedy="Update this node pack.")
    return SCHEMES[name]


def holds_codes(dtype: torch.dtype) -> bool:
    """Whether a weight of this dtype in a file is quantized, by any tool."""
    return dtype in FLOAT8_DTYPES or any(row.dtype == dtype for row in SCHEMES.values())


def scheme_stored(dtype: torch.dtype, scales: int, number_format: str | None = None) -> Scheme | None:
    """The scheme a tensor in a file is stored in; None: not in the table.

    Args:
        dtype: dtype of the weight in the file.
        scales: number of elements of its scale; 0: no scale.
        number_format: the format in its ``comfy_quant``; None: no ``comfy_quant``.
    """
    granularity = CHANNEL if scales > 1 else TENSOR
    rows = (row for row in SCHEMES.values() if row.dtype == dtype and row.scaled == bool(scales))
    matches = [row for row in rows if number_format in (None, row.number_format)]
    return next((row for row in matches if not row.scaled or row.granularity == granularity), None)
