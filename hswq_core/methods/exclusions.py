"""Which layers are never quantized, whatever the method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..calibration.observer import LayerStats
from ..model.families import Family
from ..model.layer import Layer

# ComfyUI's dynamic VRAM requantizes modules of up to 16 KB at transfer, with a scale of its own: so many
# weights of one byte each.
TINY_WEIGHTS = 16 * 1024
NEVER_CALLED = "not used by the calibrated workflow"


@dataclass(frozen=True)
class Exclusions:
    """The rules for one model.

    Attributes:
        family: whose named layers are excluded.
        tiny: layers of at most so many weights are excluded.
    """

    family: Family
    tiny: int = TINY_WEIGHTS

    @classmethod
    def as_published(cls, family: Family) -> Exclusions:
        """None by name or size: the original HSWQ ranks every layer it has seen."""
        return cls(replace(family, never=()), tiny=0)

    def reason(self, layer: Layer, stats: LayerStats | None) -> str | None:
        """Why ``layer`` is never quantized, or None if it may be. ``stats``: None if nothing was calibrated."""
        if layer.weights <= self.tiny:
            return f"at most {self.tiny // 1024} K weights"
        if stats is not None and stats.in_calls == 0:
            return NEVER_CALLED
        return self.family.never_reason(layer.name)

    def reasons(self, layers: list[Layer], stats: Mapping[str, LayerStats]) -> dict[str, str]:
        """{name: reason} of the excluded ones."""
        found = {layer.name: self.reason(layer, stats.get(layer.name)) for layer in layers}
        return {name: reason for name, reason in found.items() if reason is not None}
