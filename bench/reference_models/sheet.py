"""The contact sheet of the reference models: `nox -s bench -- reference_models/sheet.py`."""

from __future__ import annotations

import argparse
import sys
import textwrap
from pathlib import Path

if __name__ == "__main__":  # this package's parent, not the package
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import matplotlib as mpl
import torch
from rig.inprocess import load_comfy, load_model

from reference_models.architectures import FOLDER, REFERENCES, register
from reference_models.prompts import evaluation_prompts
from reference_models.sampling import draw


def main() -> None:
    """Draw the first evaluation prompts with each model, with captions above."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=FOLDER / "contact_sheet.png")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    load_comfy()
    register()
    prompts = evaluation_prompts(options.prompts)
    rows = {}
    for reference in REFERENCES.values():
        with torch.inference_mode():
            rows[reference.layout] = draw(load_model(reference.file), reference, prompts)
    sheet(rows, [prompt.caption for prompt in prompts], options.output)
    print(options.output)


def sheet(rows: dict[str, torch.Tensor], captions: list[str], path: Path) -> None:
    """One row of pictures per model, a caption above each column."""
    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        len(rows), len(captions), figsize=(1.7 * len(captions), 1.7 * len(rows) + 1), squeeze=False
    )
    for line, (name, pictures) in zip(axes, rows.items(), strict=True):
        for axis, picture in zip(line, pictures, strict=True):
            axis.imshow(picture.permute(1, 2, 0), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(name)
    for axis, caption in zip(axes[0], captions, strict=True):
        axis.set_title(textwrap.fill(caption, 22), fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
