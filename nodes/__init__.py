"""The pack's nodes and the one list of them."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .calibration import HSWQCalibration
from .compare import HSWQCompare
from .converter import HSWQConverter
from .file_converter import HSWQFileConverter
from .loaders import HSWQDiffusionModelLoader, HSWQLoader
from .prompts import HSWQCalibrationPrompts

NODES: list[type[io.ComfyNode]] = [
    HSWQCalibration,
    HSWQCalibrationPrompts,
    HSWQConverter,
    HSWQFileConverter,
    HSWQLoader,
    HSWQDiffusionModelLoader,
    HSWQCompare,
]


class HSWQExtension(ComfyExtension):
    """ComfyUI asks it for the nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """All nodes of the pack."""
        return NODES


async def comfy_entrypoint() -> HSWQExtension:
    """ComfyUI's entry point for V3 packs."""
    return HSWQExtension()
