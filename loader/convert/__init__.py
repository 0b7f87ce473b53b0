"""Conversions that ComfyUI's nodes ask for: of a connected MODEL, or of a file it lists."""
