"""Small diffusion models of ComfyUI's own classes, trained on drawn, captioned pictures, to judge every method."""
