"""LPIPS, where its package is installed and its backbone's weights are in torch's cache; nothing is ever downloaded."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch

LEAST_SIDE = 31  # pixels that AlexNet's convolutions and poolings need
Measure = Callable[[torch.Tensor, torch.Tensor], float | None]


def lpips_here() -> Measure | None:
    """(picture, reference), both float32 [3, H, W] in 0..1 -> LPIPS (AlexNet, 0 for equal pictures), or None.

    None instead of a measure: it is not installed, or its backbone was never downloaded. None instead of a number:
    the picture is too small.
    """
    if find_spec("lpips") is None or not _backbone().is_file():
        return None
    from lpips import LPIPS  # noqa: PLC0415 - an optional package

    # pnet_rand: otherwise it would download the backbone, and unpickle it without weights_only.
    model = LPIPS(net="alex", pnet_rand=True, verbose=False)
    weights = torch.load(_backbone(), map_location="cpu", weights_only=True)
    model.net.load_state_dict({key: weights[f"features.{key.split('.', 1)[1]}"] for key in model.net.state_dict()})

    def measure(picture: torch.Tensor, reference: torch.Tensor) -> float | None:
        if min(picture.shape[-2:]) < LEAST_SIDE:
            return None
        return float(model.to(picture.device)(picture[None], reference[None], normalize=True).item())

    return measure


def _backbone() -> Path:
    from torchvision.models import AlexNet_Weights  # noqa: PLC0415 - only where lpips is, which needs it

    return Path(torch.hub.get_dir(), "checkpoints", Path(AlexNet_Weights.IMAGENET1K_V1.url).name)
