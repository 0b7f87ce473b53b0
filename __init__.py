"""HSWQ for ComfyUI: FP8 quantization by what is measured on your own model."""

from .loader.support import require_comfyui

require_comfyui()

from .nodes import comfy_entrypoint  # noqa: E402

WEB_DIRECTORY = "./web"  # scripts of the page, and web/docs/<node id>/<language>.md

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
