"""The internals of ComfyUI's LoRAs: ``weights`` are (up, down, alpha, mid, dora_scale, reshape).

Seen in ComfyUI 0.18.2, 0.24.1 and 0.30.0. In another order LoRAs would add something else, or raise for factors that
do not fit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias, cast

from comfy.model_patcher import LowVramPatch
from comfy.weight_adapter import LoRAAdapter

if TYPE_CHECKING:
    import torch

    from .types import WeightFunction

# (up [out, rank, ...], down [rank, in, ...], alpha or None)
Factors: TypeAlias = "tuple[torch.Tensor, torch.Tensor, float | None]"


def is_low_rank(value: object) -> bool:
    """Whether a patch's value is up @ down and nothing else: no DoRA, no CP factor, no other shape."""
    return isinstance(value, LoRAAdapter) and not any(part is not None for part in value.weights[3:])


def factors_of(adapter: LoRAAdapter) -> Factors:
    """Of an adapter that ``is_low_rank``."""
    return cast(Factors, tuple(adapter.weights[:3]))


def is_lowvram_patch(function: WeightFunction) -> bool:
    """Whether a weight function is ComfyUI's own LoRAs of a weight that it streams from RAM.

    Without ``LowVramPatch`` the import of this module fails.
    """
    return isinstance(function, LowVramPatch)
