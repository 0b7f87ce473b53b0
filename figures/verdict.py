"""What two batches of pictures look like side by side, in words."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Level:
    """What a pair of pictures looks like.

    Attributes:
        psnr, ssim: the least it needs of each, dB and 0..1.
        words: for people.
    """

    psnr: float
    ssim: float
    words: str


# PSNR: 58.9 dB = 10·log10(12·255²) is the error of rounding to 8 bits, 48.1 dB = 20·log10(255) a difference of one of
# 255 steps (root mean square); 30 to 50 dB is the usual range of lossy compression of pictures, and from 40 dB it is
# commonly called hard to see; 20 is a guess. SSIM: a guess, below what pictures of such a PSNR mostly had in
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
    ("model_aware at +3 %", 52, 57),
)
LISTED = 4  # faults in the verdict; the report has them all
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
        same: whether both look exactly equal.
        faults: what is broken, in words.
        lpips: of the colours, where available.
    """

    number: int
    psnr: float
    ssim: float
    same: bool
    faults: tuple[str, ...] = ()
    lpips: float | None = None

    @property
    def level(self) -> Level:
        """What it looks like."""
        if self.same:
            return LEVELS[0]
        return next(level for level in LEVELS if self.psnr >= level.psnr and self.ssim >= level.ssim)

    @property
    def scores(self) -> str:
        """PSNR and SSIM, and LPIPS where there is one."""
        return f"PSNR {self.psnr:.1f} dB, SSIM {self.ssim:.4f}{_lpips(self.lpips)}"

    @property
    def line(self) -> str:
        """Everything about it in one line."""
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
    def lpips(self) -> float | None:
        """Mean over the pictures, where available."""
        scores = [pair.lpips for pair in self.pairs if pair.lpips is not None]
        return sum(scores) / len(scores) if scores else None

    @property
    def worst(self) -> Pair:
        """A broken pair before all others, then the smallest PSNR."""
        return min(self.pairs, key=lambda pair: (not pair.faults, pair.psnr, pair.ssim))

    @property
    def verdict(self) -> str:
        """What to think of it, worst first: a node shows few lines."""
        faults = [fault for pair in self.pairs for fault in pair.faults]
        if faults:
            more = f"; and {len(faults) - LISTED} faults more" if len(faults) > LISTED else ""
            return f"Verdict: broken: {'; '.join(faults[:LISTED])}{more}. {BROKEN}"
        by_level = {level: [pair for pair in self.pairs if pair.level == level] for level in reversed(LEVELS)}
        said = [(_which(pairs), level.words) for level, pairs in by_level.items() if pairs]
        if len(said) == 1:
            return f"Verdict: {said[0][1]}."
        return f"Verdict: {'; '.join(f'{which}: {words}' for which, words in said)}."

    @property
    def summary(self) -> str:
        """The means with the worst picture, and the verdict: two lines."""
        return f"{self._means()}\n{self.verdict}"

    @property
    def report(self) -> str:
        """The summary, what is usual, and a line for each picture."""
        usual = ", ".join(f"{what} {low} to {high} dB" for what, low, high in USUAL)
        scale = f"For scale, mean PSNR of the README's models: {usual}."
        return "\n".join([self.summary, scale, "", *(pair.line for pair in self.pairs)])

    @property
    def caption(self) -> str:
        """The worst pair in one line."""
        return f"picture {self.worst.number} of {len(self.pairs)}: {', '.join([self.worst.scores, *self.worst.faults])}"

    def _means(self) -> str:
        if len(self.pairs) == 1:
            return f"1 picture: {self.pairs[0].scores}."
        means = f"{len(self.pairs)} pictures: mean PSNR {self.psnr:.1f} dB, SSIM {self.ssim:.4f}{_lpips(self.lpips)}"
        if all(pair.same for pair in self.pairs):
            return f"{means}."
        return f"{means}; worst is picture {self.worst.number}: {self.worst.psnr:.1f} dB, {self.worst.ssim:.4f}."


def _lpips(score: float | None) -> str:
    return "" if score is None else f", LPIPS {score:.4f}"


def _which(pairs: list[Pair]) -> str:
    return f"picture {pairs[0].number}" if len(pairs) == 1 else f"{len(pairs)} pictures"
