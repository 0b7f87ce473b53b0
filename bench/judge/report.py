"""Results as JSON, as a Markdown table and as a plot of quality over size."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch

from judge.scores import Score

Results = dict[str, list[Score]]
AGREES_DB = 0.05


def to_json(results: Results, settings: dict[str, Any]) -> str:
    """Everything, with the machine it was made on."""
    machine = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
    }
    models = {name: [asdict(score) for score in scores] for name, scores in results.items()}
    return json.dumps({"settings": settings, "machine": machine, "models": models}, indent=1)


def from_json(text: str) -> Results:
    """The scores of ``to_json``."""
    return {name: [Score(**score) for score in scores] for name, scores in json.loads(text)["models"].items()}


def table(scores: list[Score]) -> str:
    """Markdown, one row a method."""
    head = [
        "| method | file, bytes | extra | 8-bit layers | PSNR mean | 5th pct | worst | SSIM | per call | convert |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    return "\n".join([*head, *(_line(score) for score in scores)])


def _line(score: Score) -> str:
    cells = (
        score.label,
        f"{score.file_bytes:,}",
        f"{score.extra:+.1%}",
        f"{score.quantized}/{score.layers}",
        f"{np.mean(score.psnr):.1f}",
        f"{np.percentile(score.psnr, 5):.1f}",
        f"{min(score.psnr):.1f}",
        f"{np.mean(score.ssim):.4f}",
        f"{score.call_error:.2%}",
        f"{score.make_seconds:.0f} s",
    )
    return f"| {' | '.join(cells)} |"


def disagreements(one: Results, other: Results) -> list[str]:
    """Methods in both whose mean PSNR differs by more than AGREES_DB."""
    found = []
    for model, scores in one.items():
        theirs = {score.method: score for score in other.get(model, [])}
        for score in scores:
            if score.method in theirs:
                difference = float(np.mean(score.psnr) - np.mean(theirs[score.method].psnr))
                if abs(difference) > AGREES_DB:
                    found.append(f"{model}, {score.method}: {difference:+.2f} dB")
    return found


def plot(results: Results, path: Path) -> None:
    """Mean and 5th percentile of PSNR over extra bytes, one panel a model."""
    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(results), figsize=(6.5 * len(results), 5), squeeze=False)
    for axis, (name, scores) in zip(axes[0], results.items(), strict=True):
        for score in scores:
            mean, low = np.mean(score.psnr), np.percentile(score.psnr, 5)
            (line,) = axis.plot([100 * score.extra] * 2, [mean, low], alpha=0.5)
            axis.plot(100 * score.extra, mean, "o", color=line.get_color(), label=score.label)
        axis.set(title=name, xlabel="bytes beyond all layers in 8 bits, %", ylabel="PSNR against FP16, dB (to 5th pct)")
        axis.grid(alpha=0.3)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=3, fontsize=8)
    figure.tight_layout(rect=(0, 0.2, 1, 1))
    figure.savefig(path, dpi=90)
    plt.close(figure)
