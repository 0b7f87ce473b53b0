"""Small diffusion models of ComfyUI's own classes, trained on drawn, captioned pictures: the judges of every method."""
