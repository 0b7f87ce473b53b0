"""The contact sheet: FP16 and each method for some prompts, with the difference amplified."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, ImageDraw
from reference_models.pictures import as_image

from judge.scores import Score, Truth

GAIN, ENLARGED, GAP, HEAD = 8, 4, 6, 72


def contact_sheet(truth: Truth, drawn: list[tuple[Score, torch.Tensor]], path: Path, count: int = 3) -> None:
    """The first prompts and the worst one; below each picture its difference from FP16, amplified ``GAIN`` times.

    worst: the prompt with the smallest PSNR of any method.
    """
    worst = min((score.psnr[i], i) for score, _ in drawn for i in range(len(score.psnr)))[1]
    chosen = [*[i for i in range(len(truth.prompts)) if i != worst][:count], worst]
    side = truth.pictures.shape[-1] * ENLARGED
    size = ((side + GAP) * (len(drawn) + 1), HEAD + (2 * side + GAP) * len(chosen))
    sheet = Image.new("RGB", size, (32, 32, 32))
    pen = ImageDraw.Draw(sheet)
    _write(pen, 0, "FP16", "")
    for column, (score, _) in enumerate(drawn, 1):
        _write(pen, column * (side + GAP), score.label, f"{sum(score.psnr) / len(score.psnr):.1f} dB")
    for row, index in enumerate(chosen):
        top = HEAD + row * (2 * side + GAP)
        sheet.paste(as_image(truth.pictures[index], ENLARGED), (0, top))
        note = f"{truth.prompts[index].caption}{' (worst)' if index == worst else ''}"
        pen.multiline_text((4, top + side + 4), _wrapped(note, 20), fill="white")
        for column, (_, pictures) in enumerate(drawn, 1):
            left = column * (side + GAP)
            difference = (pictures[index] - truth.pictures[index]) * GAIN / 2 + 0.5
            sheet.paste(as_image(pictures[index], ENLARGED), (left, top))
            sheet.paste(as_image(difference.clamp(0, 1), ENLARGED), (left, top + side))
    sheet.save(path, optimize=True)


def _write(pen: ImageDraw.ImageDraw, left: int, label: str, note: str) -> None:
    pen.multiline_text((left + 2, 2), f"{_wrapped(label, 20)}\n{note}", fill="white")


def _wrapped(text: str, width: int) -> str:
    lines = [""]
    for word in text.split():
        lines.append(word) if len(lines[-1]) + len(word) > width else lines.append(f"{lines.pop()} {word}".strip())
    return "\n".join(lines)
