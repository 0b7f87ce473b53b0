"""ComfyUI's server, whose class sets ``instance`` when it is made and declares it nowhere.

Seen in ComfyUI 0.18.2, 0.24.1 and 0.30.0. Without it AttributeError is raised when ComfyUI loads the pack.
"""

from __future__ import annotations

from typing import cast

from server import PromptServer


def prompt_server() -> PromptServer | None:
    """The one that runs; None where benches run nodes without one."""
    server: PromptServer | None = PromptServer.instance  # type: ignore[attr-defined]
    return server


def running_server() -> PromptServer:
    """The one that runs whenever ComfyUI loads the pack."""
    return cast(PromptServer, prompt_server())
