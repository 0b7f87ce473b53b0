"""HSWQ for ComfyUI: FP8 quantization by what is measured on your own model."""

if "." in __name__ or "/" in __name__ or __package__:  # as ComfyUI imports a pack; not when pytest collects the folder
    from .nodes import comfy_entrypoint

    __all__ = ["comfy_entrypoint"]
