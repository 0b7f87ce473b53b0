"""The pack's nodes and the one list of them."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from ..loader.comfyui.server import running_server
from ..loader.open.guard import watcher
from .calibration import HSWQCalibration
from .compare import HSWQCompare
from .converter import HSWQConverter
from .file_converter import HSWQFileConverter
from .loaders import HSWQDiffusionModelLoader, HSWQLoader
from .merge_sessions import HSWQMergeSessions
from .prompts import HSWQCalibrationPrompts
from .report import HSWQReport
from .routes import add_routes
from .status import show_text

NODES: list[type[io.ComfyNode]] = [
    HSWQCalibration,
    HSWQCalibrationPrompts,
    HSWQConverter,
    HSWQFileConverter,
    HSWQLoader,
    HSWQDiffusionModelLoader,
    HSWQReport,
    HSWQCompare,
    HSWQMergeSessions,
]


class HSWQExtension(ComfyExtension):
    """ComfyUI asks it for the nodes."""

    async def on_load(self) -> None:
        """Answer the page's scripts, and watch what is queued for files that stock loaders would misread."""
        add_routes()
        running_server().add_on_prompt_handler(watcher(show_text))

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """All nodes of the pack."""
        return NODES


async def comfy_entrypoint() -> HSWQExtension:
    """ComfyUI's entry point for V3 packs."""
    return HSWQExtension()
