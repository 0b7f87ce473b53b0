"""How far one picture is from another: PSNR and SSIM, the only place where the pack computes them."""

from __future__ import annotations

import torch

# Two equal pictures have an infinite PSNR; 8-bit pictures cannot resolve anything above this.
MOST_DB = 100.0
SSIM_WINDOW = 11  # of Wang et al. 2004, with a Gaussian of 1.5 pixels


def psnr(picture: torch.Tensor, reference: torch.Tensor) -> float:
    """10·log10(1 / mean squared difference) in dB, at most MOST_DB.

    Args:
        picture: float in 0..1, any shape.
        reference: the same shape and dtype.
    """
    from kornia.metrics import psnr as decibels  # noqa: PLC0415 - kornia takes a second to import

    return min(float(decibels(picture, reference, 1.0).item()), MOST_DB)


def ssim(picture: torch.Tensor, reference: torch.Tensor) -> float:
    """Structural similarity, mean over pixels and channels; 1 for equal pictures.

    The window is reflected at the borders. A picture of less than 6 pixels a side gets the largest window whose
    reflection it still holds.

    Args:
        picture: float [C, H, W] in 0..1.
        reference: the same shape and dtype.
    """
    from kornia.metrics import ssim as similarity  # noqa: PLC0415

    window = min(SSIM_WINDOW, 2 * min(picture.shape[-2:]) - 1)
    return float(similarity(picture[None], reference[None], window).mean().item())
