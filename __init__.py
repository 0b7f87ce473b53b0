"""HSWQ for ComfyUI: FP8 quantization by what is measured on your own model."""

from .loader.support import require_comfyui

require_comfyui()

from .nodes import comfy_entrypoint  # noqa: E402

__all__ = ["comfy_entrypoint"]
