"""Everything that touches ComfyUI except the node schemas."""
