"""Layers that no method quantizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..calibration.observer import LayerStats
from ..model.families import Family
from ..model.layer import Layer

# ComfyUI's dynamic VRAM requantizes modules of up to 16 KB on transfer, with its own scale: this many one-byte
# weights.
TINY_WEIGHTS = 16 * 1024
NEVER_CALLED = "not used by the calibrated workflow"


@dataclass(frozen=True)
class Exclusions:
    """The rules for one model.

    Attributes:
        family: its ``never`` layers are excluded.
        tiny: layers of at most this many weights are excluded.
    """

    family: Family
    tiny: int = TINY_WEIGHTS

    @classmethod
    def as_published(cls, family: Family) -> Exclusions:
        """No exclusions by name or size: the original HSWQ ranks every layer it has seen."""
        return cls(replace(family, never=()), tiny=0)

    def reason(self, layer: Layer, stats: LayerStats | None) -> str | None:
        """Why ``layer`` is never quantized, or None if it may be. ``stats``: None without calibration."""
        if layer.weights <= self.tiny:
            return f"at most {self.tiny // 1024} K weights"
        if stats is not None and stats.in_calls == 0:
            return NEVER_CALLED
        return self.family.never_reason(layer.name)

    def reasons(self, layers: list[Layer], stats: Mapping[str, LayerStats]) -> dict[str, str]:
        """{name: reason} of the excluded layers."""
        checked = {layer.name: self.reason(layer, stats.get(layer.name)) for layer in layers}
        return {name: reason for name, reason in checked.items() if reason is not None}
