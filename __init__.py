"""HSWQ for ComfyUI: FP8 quantization by what is measured on your own model."""

from .nodes import comfy_entrypoint

__all__ = ["comfy_entrypoint"]
