"""Hooks on models and text encoders that feed observers while ComfyUI samples."""
