"""Whether the pack supports this ComfyUI, checked before anything fails with an obscure error."""

from __future__ import annotations

import importlib

MINIMUM = (0, 18, 2)


def require_comfyui() -> None:
    """Raise ImportError, which ComfyUI logs at its start, if it is too old or lacks comfy-kitchen."""
    try:
        installed = str(importlib.import_module("comfyui_version").__version__)
    except ImportError:
        installed = "none that says its version"
    numbers = tuple(int(part) for part in installed.split(".")[:3] if part.isdigit())
    if numbers < MINIMUM:
        raise ImportError(
            f"HSWQ, ComfyUI: got {installed}, expected {'.'.join(map(str, MINIMUM))} or newer. "
            "Update ComfyUI and install its requirements.txt."
        )
    try:
        importlib.import_module("comfy_kitchen")
    except ImportError as error:
        raise ImportError(
            f"HSWQ, package comfy-kitchen: got {error}, expected the version ComfyUI {installed} asks for. "
            "Install ComfyUI's requirements.txt with the Python that runs it."
        ) from error
