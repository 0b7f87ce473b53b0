"""The latent format of the reference UNet: wavelets instead of pixels, each of about unit variance.

Predicted noise carries an error in each channel's mean that the first, noisiest steps multiply by their sigma.
Among the four pixels of a block such errors are a checkerboard; in Haar coefficients, whose details are enlarged,
they are a slight shift of colour.
"""

from __future__ import annotations

import torch

# Rows: mean, left-right, up-down, diagonal of a block's four pixels; orthonormal.
HAAR = ((1, 1, 1, 1), (1, -1, 1, -1), (1, 1, -1, -1), (1, -1, -1, 1))
# To unit variance over drawn scenes. Larger latents would show through the noise of the highest sigma, and the model
# would learn to look there instead of at the caption.
GAINS = (0.75, 6.0, 6.0, 15.0)


def to_wavelets(blocks: torch.Tensor) -> torch.Tensor:
    """[n, 4·c, h, w] of unshuffled pixels -> the same shape of enlarged Haar coefficients."""
    return _mixed(blocks, _matrix())


def to_blocks(wavelets: torch.Tensor) -> torch.Tensor:
    """The inverse of ``to_wavelets``."""
    return _mixed(wavelets, torch.linalg.inv(_matrix()))


def wavelet_format() -> type:
    """Flux's latent format, then wavelets; imports comfy."""
    import comfy.latent_formats

    class WaveletLatents(comfy.latent_formats.Flux):  # type: ignore[misc]
        def process_in(self, latent: torch.Tensor) -> torch.Tensor:
            return to_wavelets(super().process_in(latent))

        def process_out(self, latent: torch.Tensor) -> torch.Tensor:
            return super().process_out(to_blocks(latent))

    return WaveletLatents


def _matrix() -> torch.Tensor:
    return torch.tensor(HAAR) / 2 * torch.tensor(GAINS)[:, None]


def _mixed(x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    grouped = x.unflatten(1, (-1, 4))
    return torch.einsum("ij,bcjhw->bcihw", matrix.to(x), grouped).flatten(1, 2)
