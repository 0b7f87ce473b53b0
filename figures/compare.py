"""Two batches of pictures, pair by pair: scores, and what is broken."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..hswq_core.errors import SettingError
from ..hswq_core.progress import Progress, Step, no_progress
from .perceptual import Measure, lpips_here
from .scores import psnr, ssim
from .verdict import Comparison, Pair

# Below this ComfyUI saves a channel as 0: it multiplies by 255 and drops the fraction.
BLACK = 1 / 255
LIT = 16 / 255  # guess: films count nothing darker as bright, so fading to black is not a fault
CHANNELS = (3, 4)


def compare(
    reference: torch.Tensor,
    candidate: torch.Tensor,
    progress: Progress = no_progress,
) -> Comparison:
    """Score every picture against the reference at its place, one at a time.

    Compares what a viewer sees: values are clamped to 0..1, NaN counts as black. A fourth channel (alpha) counts
    like a colour.

    Args:
        reference: IMAGE, float [B, H, W, C], C 3 or 4.
        candidate: IMAGE of the same shape.
        progress: called as (step, done, total).

    Raises:
        SettingError: the batches differ in shape, are empty, or are not colour pictures.
    """
    check(reference, candidate)
    return Comparison(tuple(_pairs(reference, candidate, progress)))


def check(reference: torch.Tensor, candidate: torch.Tensor) -> None:
    """Raise SettingError for what cannot be compared; nothing is ever resized or repeated to fit."""
    if reference.shape[0] == 0 or reference.shape[-1] not in CHANNELS:
        raise SettingError(
            "HSWQ Compare, reference",
            got=_shape(reference),
            expected="pictures of 3 channels, or of 4 with alpha",
            remedy="Connect the pictures of the original model.",
        )
    if reference.shape != candidate.shape:
        raise SettingError(
            "HSWQ Compare, candidate",
            got=_shape(candidate),
            expected=f"{_shape(reference)}, as in reference",
            remedy="Draw both with the same prompts, seeds, size and batch, or repeat a single reference with "
            "RepeatImageBatch: each picture is compared with the one of its place, pixel by pixel.",
        )


def seen(picture: torch.Tensor) -> torch.Tensor:
    """What a viewer sees of a picture of any range, float32 in 0..1: NaN and -infinity are black."""
    return torch.nan_to_num(picture.float(), nan=0.0, posinf=1.0, neginf=0.0).clamp(0.0, 1.0)


def _pairs(reference: torch.Tensor, candidate: torch.Tensor, progress: Progress) -> Iterator[Pair]:
    lpips = lpips_here()
    for index, (wanted, got) in enumerate(zip(reference, candidate, strict=True)):
        progress(Step("Comparing", "pictures"), index, len(reference))
        yield _pair(index + 1, wanted, got.to(wanted.device), lpips)
    progress(Step("Comparing", "pictures"), len(reference), len(reference))


def _pair(number: int, reference: torch.Tensor, candidate: torch.Tensor, lpips: Measure | None) -> Pair:
    wanted, got = (seen(picture).permute(2, 0, 1).contiguous() for picture in (reference, candidate))
    faults = (
        *_not_finite(f"reference {number}", reference),
        *_not_finite(f"picture {number}", candidate),
        *_one_black(number, wanted, got),
    )
    perceived = lpips(got[:3], wanted[:3]) if lpips else None
    return Pair(number, psnr(got, wanted), ssim(got, wanted), torch.equal(got, wanted), faults, perceived)


def _not_finite(name: str, picture: torch.Tensor) -> Iterator[str]:
    if bool(picture.isnan().any()):
        yield f"{name} holds NaN"
    if bool(picture.isinf().any()):
        yield f"{name} holds infinity"


def _one_black(number: int, wanted: torch.Tensor, got: torch.Tensor) -> Iterator[str]:
    """Two black pictures are not a fault: films have them."""
    reference, picture = (tensor[:3].amax().item() for tensor in (wanted, got))
    if picture < BLACK and reference >= LIT:
        yield f"picture {number} is black, its reference is not"
    if reference < BLACK and picture >= LIT:
        yield f"reference {number} is black, its picture is not"


def _shape(pictures: torch.Tensor) -> str:
    count, height, width, channels = pictures.shape
    return f"{count} {'picture' if count == 1 else 'pictures'} of {width} × {height} in {channels} channels"
