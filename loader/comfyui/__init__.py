"""What ComfyUI leaves untyped, and the private names of ComfyUI and torch that the pack needs: nowhere else."""
