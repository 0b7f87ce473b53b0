"""How to open a file."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...hswq_core.errors import SettingError
from .lora import EXACT, LORA_MODES

AUTO = "auto"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Opening:
    """How to open a file.

    Attributes:
        lora: "exact" or "stock", see ``lora``.
        dequantize_dtype: what FP8 weights become for each call and the model computes in: a key of ``DTYPES``, or
            "auto", ComfyUI's choice for the model and the device.
        fp8_matmul: multiply in FP8 where the device can and the file has an ``input_scale``.
    """

    lora: str = EXACT
    dequantize_dtype: str = AUTO
    fp8_matmul: bool = True

    def __post_init__(self) -> None:
        for name, value, known in (
            ("lora", self.lora, LORA_MODES),
            ("dequantize_dtype", self.dequantize_dtype, (AUTO, *DTYPES)),
        ):
            if value not in known:
                raise SettingError(name, got=repr(value), expected=" or ".join(known), remedy="Choose one of them.")
