"""The whole workflow in one command: calibrate, convert to V1, V2 and comfy, load, compare.

A real ComfyUI server runs the shipped Flux workflows over HTTP on the trained Flux-layout reference model, with
captions that calibration never saw. `nox -s quality` measures how good each method is on each model.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from reference_models.pictures import as_image
from reference_models.prompts import Prompt as Caption
from reference_models.prompts import calibration_prompts, evaluation_prompts
from rig import flow, pack
from rig.client import Prompt, Result
from rig.server import ComfyServer
from tqdm import tqdm

pack.alias()

from hswq.figures.scores import psnr  # noqa: E402
from hswq.hswq_core.files.checkpoint import FileSource  # noqa: E402
from hswq.hswq_core.quant.grid import FLOAT8_E4M3FN  # noqa: E402
from hswq.hswq_core.quant.metrics import error_to_db  # noqa: E402

FAMILY, FOLDER, SESSION, SIZE = "flux", "diffusion_models", "demo", 128
# format -> does the stock loader open it?
FORMATS = {"v1": False, "v2": False, "comfy": True}


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    file: str
    size: int
    counts: str
    sqnr: str
    psnr: str
    opened_by: str


def main() -> None:
    """Run it all, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=4, help="calibration runs, each another caption and seed")
    parser.add_argument("--pictures", type=int, default=4, help="to compare by")
    parser.add_argument("--steps", type=int, default=20, help="sampling steps")
    parser.add_argument("--output", type=Path, default=pack.ROOT / "demo_output", help="folder for the pictures")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options.output.mkdir(parents=True, exist_ok=True)
    stages = options.runs + options.pictures + (1 + options.pictures) * len(FORMATS)
    with tqdm(total=stages, bar_format="{n_fmt}/{total_fmt} {desc}", dynamic_ncols=True) as bar:
        bar.set_description_str("starting ComfyUI")
        with ComfyServer([pack.ROOT / "bench" / "rig" / "testnodes"]) as server:
            rows = Demo(server, options, bar).rows()
    print(table(rows))
    print(f"\nPictures: {options.output}")


class Demo:
    """Calibrate; then each format: convert, open, draw."""

    def __init__(self, server: ComfyServer, options: Any, bar: tqdm[Any]) -> None:
        self.server, self.options, self.bar = server, options, bar
        self.captions = evaluation_prompts(options.pictures)
        self.source = flow.TRAINED[FAMILY]

    def rows(self) -> list[Row]:
        """One row for the source, one for each format."""
        for number, caption in enumerate(calibration_prompts(self.options.runs), 1):
            self.run(f"calibrating, run {number}", flow.calibration(self.prompt(flow.CALIBRATE, caption)))
        reference = self.draw("FP16", self.source.file_name, stock=True)
        rows = [Row(self.source.file_name, self.source.file.stat().st_size, "-", "-", "-", "stock")]
        workflow = self.prompt(flow.CALIBRATE, self.captions[0])
        for name, stock in FORMATS.items():
            self.run(f"converting to {name}", flow.conversion(self.server, workflow, format=name))
            file = newest(self.server)
            rows.append(row(self.source.file, file, reference, self.draw(name, file.name, stock=stock), stock))
        return rows

    def run(self, stage: str, prompt: Prompt) -> Result:
        """One queue item."""
        self.bar.set_description_str(stage)
        result = self.server.client.run(prompt).check()
        self.bar.update()
        return result

    def prompt(self, job: str, caption: Caption) -> Prompt:
        """A shipped workflow for one caption."""
        settings = {"session": SESSION, "steps": self.options.steps, "size": SIZE}
        return flow.prepare(self.server, FAMILY, job, seed=caption.seed, caption=caption.caption, **settings)

    def draw(self, name: str, file: str, *, stock: bool) -> torch.Tensor:
        """Draw a file's pictures [n, 3, height, width] in 0..1, and save them as one PNG."""
        drawn = []
        for caption in self.captions:
            opened = flow.opening(self.prompt(flow.LOAD, caption), file, FOLDER, stock=stock)
            drawn.append(picture(self.server, self.run(f'{name}: "{caption.caption}"', opened)))
        pictures = torch.stack(drawn)
        as_image(torch.cat(list(pictures), 2), 6).save(self.options.output / f"{name.lower()}.png")
        return pictures


def newest(server: ComfyServer) -> Path:
    """The most recently written file."""
    return max((server.output / FOLDER).glob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns)


def picture(server: ComfyServer, result: Result) -> torch.Tensor:
    """The picture of a result, [3, height, width] in 0..1."""
    (image,) = result.images()
    pixels = np.asarray(Image.open(io.BytesIO(server.client.view(image))).convert("RGB"))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255


def row(source: Path, file: Path, reference: torch.Tensor, drawn: torch.Tensor, stock: bool) -> Row:
    """The row of a converted file."""
    header = json.loads(FileSource(file).metadata["hswq"])
    counts = "/".join(str(header["counts"][action]) for action in ("quantize", "keep", "skip"))
    quality = np.mean([psnr(a, b) for a, b in zip(drawn, reference, strict=True)])
    opened_by = "stock" if stock else "HSWQ Loader"
    return Row(file.name, file.stat().st_size, counts, f"{sqnr(source, file):.1f} dB", f"{quality:.1f} dB", opened_by)


def sqnr(original: Path, file: Path) -> float:
    """SQNR in dB over all quantized weights of a file."""
    source, converted = FileSource(original), FileSource(file)
    noise = signal = 0.0
    for key, info in converted.entries.items():
        if info.dtype == FLOAT8_E4M3FN.dtype:
            stem = key.removesuffix("weight")
            scale = next(
                (converted.read(stem + s) for s in ("scale", "weight_scale") if stem + s in converted.entries), None
            )
            weight = source.read(key).double()
            restored = FLOAT8_E4M3FN.dequantize(converted.read(key), scale).double()
            noise += (restored - weight).square().sum().item()
            signal += weight.square().sum().item()
    return error_to_db((noise / signal) ** 0.5)


def table(rows: list[Row]) -> str:
    """Markdown."""
    head = "| file | bytes | quantized/kept/skipped | weight SQNR | mean picture PSNR | opened by |"
    lines = [f"| {r.file} | {r.size:,} | {r.counts} | {r.sqnr} | {r.psnr} | {r.opened_by} |" for r in rows]
    return "\n".join([head, "|---|--:|---|--:|--:|---|", *lines])


if __name__ == "__main__":
    main()
