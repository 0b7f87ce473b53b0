"""Two batches of pictures, pair by pair: scores, what is broken, and a verdict in words."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..hswq_core import Progress, SettingError, no_progress
from .scores import psnr, ssim

# Below it ComfyUI saves a channel as 0: it multiplies by 255 and drops the fraction.
BLACK = 1 / 255
CHANNELS = (3, 4)


@dataclass(frozen=True)
class Level:
    """What a pair of pictures looks like.

    Attributes:
        psnr, ssim: the least it needs of both, dB and 0..1.
        words: for people.
    """

    psnr: float
    ssim: float
    words: str


# PSNR: 58.9 dB = 10·log10(12·255²) is the error of rounding to 8 bits, 48.1 dB = 20·log10(255) a difference of one of
# 255 steps (root mean square); 30 to 50 dB is the usual range of lossy compression of pictures, and from 40 dB it is
# commonly called hard to see; 20 is a guess. SSIM: a guess, under what pictures of such a PSNR mostly had in
# bench/results/quality.json.
LEVELS = (
    Level(math.inf, 1.0, "identical"),
    Level(58.9, 0.999, "less than rounding to 8 bits changes"),
    Level(48.1, 0.99, "no difference a viewer would notice"),
    Level(40.0, 0.95, "differences hard to see side by side"),
    Level(30.0, 0.85, "small differences, visible when flipping between the two"),
    Level(20.0, 0.5, "details differ"),
    Level(-math.inf, -math.inf, "another picture"),
)
# What methods reach on the models of the README's Quality section: words, mean PSNR of the worst and best model.
USUAL = (
    ("a plain FP8 cast", 31, 43),
    ("HSWQ as published", 31, 45),
    ("model_aware at +3 %", 51, 57),
)
BROKEN = (
    "Mostly the model or the VAE gave NaN: open the file in HSWQ Loader, which checks its scales, "
    "or start ComfyUI with --fp32-vae."
)


@dataclass(frozen=True)
class Pair:
    """One picture beside its reference.

    Attributes:
        number: counted from 1.
        psnr, ssim: of what is seen: dB, at most MOST_DB; 0..1.
        same: whether what is seen is equal.
        faults: what is broken, in words.
    """

    number: int
    psnr: float
    ssim: float
    same: bool
    faults: tuple[str, ...]

    @property
    def level(self) -> Level:
        """What it looks like."""
        if self.same:
            return LEVELS[0]
        return next(level for level in LEVELS if self.psnr >= level.psnr and self.ssim >= level.ssim)

    @property
    def scores(self) -> str:
        """PSNR and SSIM."""
        return f"PSNR {self.psnr:.1f} dB, SSIM {self.ssim:.4f}"

    @property
    def line(self) -> str:
        """Everything about it in a line."""
        return f"picture {self.number}: {self.scores}; {', '.join(self.faults) or self.level.words}"


@dataclass(frozen=True)
class Comparison:
    """All pairs, at least one."""

    pairs: tuple[Pair, ...]

    @property
    def psnr(self) -> float:
        """Mean over the pictures, dB."""
        return sum(pair.psnr for pair in self.pairs) / len(self.pairs)

    @property
    def ssim(self) -> float:
        """Mean over the pictures."""
        return sum(pair.ssim for pair in self.pairs) / len(self.pairs)

    @property
    def worst(self) -> Pair:
        """A broken one before all others, then the smallest PSNR."""
        return min(self.pairs, key=lambda pair: (not pair.faults, pair.psnr, pair.ssim))

    @property
    def verdict(self) -> str:
        """What to think of it."""
        faults = [fault for pair in self.pairs for fault in pair.faults]
        if faults:
            return f"Verdict: broken: {'; '.join(faults)}. {BROKEN}"
        found = {level: [pair for pair in self.pairs if pair.level == level] for level in LEVELS}
        said = [(_which(pairs), level.words) for level, pairs in found.items() if pairs]
        if len(said) == 1:
            return f"Verdict: {said[0][1]}."
        return f"Verdict: {'; '.join(f'{which}: {words}' for which, words in said)}."

    @property
    def summary(self) -> str:
        """The means, the worst picture, the verdict, what is usual: a line each."""
        usual = ", ".join(f"{what} {low} to {high} dB" for what, low, high in USUAL)
        return "\n".join([self._means(), self.verdict, f"For scale, PSNR of the README's models: {usual}."])

    @property
    def report(self) -> str:
        """The summary, and a line for each picture."""
        return "\n".join([self.summary, "", *(pair.line for pair in self.pairs)])

    @property
    def caption(self) -> str:
        """The worst pair in a line."""
        return f"picture {self.worst.number} of {len(self.pairs)}: {', '.join([self.worst.scores, *self.worst.faults])}"

    def _means(self) -> str:
        if len(self.pairs) == 1:
            return f"1 picture: {self.pairs[0].scores}."
        means = f"{len(self.pairs)} pictures: mean PSNR {self.psnr:.1f} dB, SSIM {self.ssim:.4f}"
        if all(pair.same for pair in self.pairs):
            return f"{means}."
        return f"{means}; worst is picture {self.worst.number}: {self.worst.psnr:.1f} dB, {self.worst.ssim:.4f}."


def compare(
    reference: torch.Tensor,
    candidate: torch.Tensor,
    progress: Progress = no_progress,
) -> Comparison:
    """Score every picture against the reference of its place, one at a time.

    What is compared is what is seen: values are cut to 0..1, NaN counts as black. A fourth channel (alpha) counts
    like a colour.

    Args:
        reference: IMAGE, float [B, H, W, C], C 3 or 4.
        candidate: IMAGE of the same shape.
        progress: called with what is done, how much, of how much.

    Raises:
        SettingError: the batches differ in shape, are empty, or are no colour pictures.
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
    """What a viewer gets to see of a picture of any range, float32 in 0..1: NaN and -infinity are black."""
    return torch.nan_to_num(picture.float(), nan=0.0, posinf=1.0, neginf=0.0).clamp(0.0, 1.0)


def _pairs(reference: torch.Tensor, candidate: torch.Tensor, progress: Progress) -> Iterator[Pair]:
    for index, (wanted, got) in enumerate(zip(reference, candidate, strict=True)):
        progress("Comparing pictures", index, len(reference))
        yield _pair(index + 1, wanted, got.to(wanted.device))
    progress("Comparing pictures", len(reference), len(reference))


def _pair(number: int, reference: torch.Tensor, candidate: torch.Tensor) -> Pair:
    wanted, got = (seen(picture).permute(2, 0, 1).contiguous() for picture in (reference, candidate))
    faults = (
        *_not_finite(f"reference {number}", reference),
        *_not_finite(f"picture {number}", candidate),
        *_one_black(number, wanted, got),
    )
    return Pair(number, psnr(got, wanted), ssim(got, wanted), torch.equal(got, wanted), faults)


def _not_finite(name: str, picture: torch.Tensor) -> Iterator[str]:
    if bool(picture.isnan().any()):
        yield f"{name} holds NaN"
    if bool(picture.isinf().any()):
        yield f"{name} holds infinity"


def _one_black(number: int, wanted: torch.Tensor, got: torch.Tensor) -> Iterator[str]:
    """Two black pictures are equal and nothing to report: films have them."""
    black = [bool(picture[:3].amax() < BLACK) for picture in (wanted, got)]
    if black == [False, True]:
        yield f"picture {number} is black, its reference is not"
    if black == [True, False]:
        yield f"reference {number} is black, its picture is not"


def _which(pairs: list[Pair]) -> str:
    return f"picture {pairs[0].number}" if len(pairs) == 1 else f"{len(pairs)} pictures"


def _shape(pictures: torch.Tensor) -> str:
    count, height, width, channels = pictures.shape
    return f"{count} {'picture' if count == 1 else 'pictures'} of {width} × {height} in {channels} channels"
