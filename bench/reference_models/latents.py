"""The latent format of the reference UNet: wavelets instead of pixels, each with about unit variance.

Predicted noise has an error in each channel's mean, which the first, noisiest steps multiply by their sigma.
Across the four pixels of a block such errors show as a checkerboard; in Haar coefficients, whose details are scaled up,
they are only a slight colour shift.
"""

from __future__ import annotations

import torch

# Rows: mean, left-right, up-down, diagonal of a block's four pixels; orthonormal.
HAAR = ((1, 1, 1, 1), (1, -1, 1, -1), (1, 1, -1, -1), (1, -1, -1, 1))
# Scales to unit variance over drawn scenes. Larger latents would show through the noise at the highest sigma, and the
# model would learn to read them instead of the caption.
GAINS = (0.75, 6.0, 6.0, 15.0)


def to_wavelets(blocks: torch.Tensor) -> torch.Tensor:
    """Unshuffled pixels [n, 4·c, h, w] -> scaled Haar coefficients of the same shape."""
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
