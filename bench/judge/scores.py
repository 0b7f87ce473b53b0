"""How good a file is: its bytes, its pictures and single calls against the FP16 model's, and the time it takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from reference_models.architectures import Reference
from reference_models.prompts import Prompt, evaluation_prompts
from reference_models.sampling import Call, call_error, draw, record
from rig import pack

from judge.methods import Method
from judge.sizes import sizes
from judge.subject import Subject, open_stock, prepare

pack.alias()

from hswq.figures.scores import psnr, ssim  # noqa: E402

RECORDED_PROMPTS = 8


@dataclass(frozen=True)
class Truth:
    """The FP16 model's own pictures and calls."""

    reference: Reference
    prompts: list[Prompt]
    pictures: torch.Tensor
    calls: list[Call]

    @classmethod
    def of(cls, reference: Reference, count: int) -> Truth:
        """Draw ``count`` evaluation prompts with the stock loader's model."""
        prepare()
        model, prompts = open_stock(reference.file), evaluation_prompts(count)
        calls = record(model, reference, prompts[:RECORDED_PROMPTS])
        return cls(reference, prompts, draw(model, reference, prompts), calls)


@dataclass(frozen=True)
class Score:
    """One row.

    Attributes:
        method, label: from the table of methods.
        file_bytes: size of the whole file.
        extra: tensor bytes over a file with every layer in 8 bits, as a share of that file's.
        quantized_bytes: size of the 8-bit weights with their scales and markers.
        quantized, layers: how many layers are in 8 bits, out of how many.
        psnr, ssim: one number per picture.
        call_error: relative error of single calls.
        make_seconds, draw_seconds: conversion; sampling all pictures.
    """

    method: str
    label: str
    file_bytes: int
    extra: float
    quantized_bytes: int
    quantized: int
    layers: int
    psnr: list[float]
    ssim: list[float]
    call_error: float
    make_seconds: float
    draw_seconds: float


def judge(method: Method, subject: Subject, truth: Truth) -> tuple[Score, torch.Tensor]:
    """Make the file, open it, draw; the score and the pictures."""
    began = time.perf_counter()
    path = method.make(subject)
    made = time.perf_counter()
    model = method.open(path)
    pictures = draw(model, truth.reference, truth.prompts)
    drawn = time.perf_counter()
    score = Score(
        method.name,
        method.label,
        path.stat().st_size,
        **sizes(path, truth.reference.file),
        psnr=each(psnr, pictures, truth.pictures),
        ssim=each(ssim, pictures, truth.pictures),
        call_error=call_error(model, truth.calls),
        make_seconds=made - began,
        draw_seconds=drawn - made,
    )
    return score, pictures


def each(
    measure: Callable[[torch.Tensor, torch.Tensor], float], pictures: torch.Tensor, truth: torch.Tensor
) -> list[float]:
    """``psnr`` or ``ssim`` of every picture."""
    return [measure(a, b) for a, b in zip(pictures, truth, strict=True)]
