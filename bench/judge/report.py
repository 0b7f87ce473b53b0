"""Results as JSON, as a Markdown table and as a plot of quality against size."""

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
MARKS = {"v1": "o", "v2": "s", "comfy": "^"}


def to_json(results: Results, settings: dict[str, Any]) -> str:
    """All results, with the machine they were made on."""
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
    """Markdown, one row per method."""
    head = [
        "| method | file, bytes | extra | 8-bit layers | PSNR mean | 5th pct | worst | SSIM | per call | convert |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    return "\n".join([*head, *(_line(score) for score in scores)])


def summary(results: Results, titles: dict[str, str]) -> str:
    """Markdown, all models side by side: extra bytes, mean PSNR and its 5th percentile in dB, mean SSIM."""
    labels = dict.fromkeys(score.label for scores in results.values() for score in scores)
    found = {(name, score.label): score for name, scores in results.items() for score in scores}
    head = " | ".join(f"{titles[name]}: bytes | PSNR (5 %) | SSIM" for name in results)
    lines = [f"| method | {head} |", f"|---{'|--:|--:|--:' * len(results)}|"]
    for label in labels:
        cells = [_cells(found.get((name, label))) for name in results]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cells(score: Score | None) -> str:
    if score is None:
        return "- | - | -"
    mean, low = np.mean(score.psnr), np.percentile(score.psnr, 5)
    return f"{score.extra:+.1%} | {mean:.1f} ({low:.1f}) | {np.mean(score.ssim):.4f}"


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


def plot(results: Results, titles: dict[str, str], path: Path) -> None:
    """PSNR against extra bytes, one panel per model: a mark at the mean, a line down to the 5th percentile."""
    mpl.use("agg")
    from matplotlib import pyplot as plt

    groups = list(dict.fromkeys(_group(score)[0] for scores in results.values() for score in scores))
    colours = dict(zip(groups, mpl.colormaps["tab20"].colors[::2] + mpl.colormaps["tab20"].colors[1::2], strict=False))
    figure, axes = plt.subplots(1, len(results), figsize=(5.5 * len(results), 5.5), squeeze=False)
    for axis, (name, scores) in zip(axes[0], results.items(), strict=True):
        for score in scores:
            group, form = _group(score)
            x, mean, low = 100 * score.extra, np.mean(score.psnr), np.percentile(score.psnr, 5)
            axis.plot([x, x], [low, mean], color=colours[group], alpha=0.4)
            axis.plot(x, mean, MARKS.get(form, "D"), color=colours[group], markersize=7)
        axis.set(title=titles[name], xlabel="bytes beyond every layer in 8 bits, %", ylabel="PSNR against FP16, dB")
        axis.grid(alpha=0.3)
    marks = [plt.Line2D([], [], color=colour, marker="o", linestyle="", label=g) for g, colour in colours.items()]
    marks += [plt.Line2D([], [], color="black", marker=m, linestyle="", label=f) for f, m in MARKS.items()]
    figure.legend(handles=marks, loc="lower center", ncols=3, fontsize=9)
    figure.tight_layout(rect=(0, 0.05 + 0.045 * (len(marks) // 3), 1, 1))
    figure.savefig(path, dpi=80)
    plt.close(figure)


def _group(score: Score) -> tuple[str, str]:
    """(label without format, budget and loss, whose methods share a colour; format)."""
    words = score.label.split(", ")
    form = words.pop() if words[-1] in MARKS else ""
    return ", ".join(word for word in words if not word.endswith(("%", "dB")) and not word.startswith("bytes")), form
