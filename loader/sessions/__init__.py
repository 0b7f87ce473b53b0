"""Sessions in ComfyUI's output folder: adding to them, listing and merging them."""
