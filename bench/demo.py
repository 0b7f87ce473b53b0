"""The whole way in one command: calibrate, convert to V1, V2 and comfy, load, compare.

A real ComfyUI server runs the shipped Flux workflows over HTTP on a small random Flux-layout model. So the
numbers show that everything works and how FP8 errs; how good pictures of a real model are, they do not.
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
from kornia.metrics import psnr
from PIL import Image
from rig import flow, pack, tiny
from rig.client import Prompt, Result
from rig.server import ComfyServer
from tqdm import tqdm

pack.alias()

from hswq.hswq_core import FLOAT8_E4M3FN, FileSource  # noqa: E402
from hswq.hswq_core.metrics import error_to_db  # noqa: E402

FAMILY, FOLDER, SESSION, EVALUATION_SEED = "flux", "diffusion_models", "demo", 1000
# format -> opened by the stock loader?
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
    parser.add_argument("--runs", type=int, default=4, help="calibration runs, each with another seed")
    parser.add_argument("--steps", type=int, default=8, help="sampling steps")
    parser.add_argument("--output", type=Path, default=pack.ROOT / "demo_output", help="folder for the pictures")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options.output.mkdir(parents=True, exist_ok=True)
    stages = options.runs + 1 + 2 * len(FORMATS)
    with tqdm(total=stages, bar_format="{n_fmt}/{total_fmt} {desc}", dynamic_ncols=True) as bar:
        bar.set_description_str("starting ComfyUI")
        with ComfyServer([pack.ROOT / "bench" / "rig" / "testnodes"]) as server:
            rows = demonstrate(server, options, bar)
    print(table(rows))
    print(f"\nPictures: {options.output}")


def demonstrate(server: ComfyServer, options: Any, bar: tqdm[Any]) -> list[Row]:
    """Calibrate, then each format: convert, open, draw the evaluation seed."""

    def run(stage: str, prompt: Prompt) -> Result:
        bar.set_description_str(stage)
        result = server.client.run(prompt).check()
        bar.update()
        return result

    settings = {"steps": options.steps, "session": SESSION}
    workflow = flow.prepare(server, FAMILY, flow.CALIBRATE, **settings)
    for seed in range(options.runs):
        calibrating = flow.prepare(server, FAMILY, flow.CALIBRATE, seed=seed, **settings)
        run(f"calibrating, seed {seed}", flow.calibration(calibrating))
    load = flow.prepare(server, FAMILY, flow.LOAD, steps=options.steps, seed=EVALUATION_SEED)
    source = flow.FAMILIES[FAMILY].kind + ".safetensors"
    reference = picture(server, run("drawing FP16", flow.opening(load, source, FOLDER, stock=True)))
    save(reference, options.output / "fp16.png")
    rows = [Row(source, tiny.make(flow.FAMILIES[FAMILY].kind).stat().st_size, "-", "-", "-", "stock")]
    for name, stock in FORMATS.items():
        run(f"converting to {name}", flow.conversion(server, workflow, format=name))
        file = newest(server)
        drawn = picture(server, run(f"drawing {name}", flow.opening(load, file.name, FOLDER, stock=stock)))
        save(drawn, options.output / f"{name}.png")
        rows.append(row(file, reference, drawn, stock))
    return rows


def newest(server: ComfyServer) -> Path:
    """The file written last."""
    return max((server.output / FOLDER).glob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns)


def picture(server: ComfyServer, result: Result) -> torch.Tensor:
    """The picture of a result, [3, height, width] in 0..1."""
    (image,) = result.images()
    pixels = np.asarray(Image.open(io.BytesIO(server.client.view(image))).convert("RGB"))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255


def save(image: torch.Tensor, path: Path) -> None:
    """Write a picture as PNG, four times its size so that pixels can be seen."""
    pixels = (image.permute(1, 2, 0) * 255).round().byte().numpy()
    large = Image.fromarray(pixels).resize((pixels.shape[1] * 4, pixels.shape[0] * 4), Image.Resampling.NEAREST)
    large.save(path)


def row(file: Path, reference: torch.Tensor, drawn: torch.Tensor, stock: bool) -> Row:
    """What a converted file is worth."""
    header = json.loads(FileSource(file).metadata["hswq"])
    counts = "/".join(str(header["counts"][action]) for action in ("quantize", "keep", "skip"))
    quality = psnr(drawn[None], reference[None], 1.0).item()
    opened_by = "stock" if stock else "HSWQ Loader"
    return Row(file.name, file.stat().st_size, counts, f"{sqnr(file):.1f} dB", f"{quality:.1f} dB", opened_by)


def sqnr(file: Path) -> float:
    """SQNR in dB of all quantized weights of a file together."""
    source, converted = FileSource(tiny.make(flow.FAMILIES[FAMILY].kind)), FileSource(file)
    noise = signal = 0.0
    for key, info in converted.entries.items():
        if info.dtype == FLOAT8_E4M3FN.dtype:
            stem = key.removesuffix("weight")
            scale = next(
                (converted.read(stem + s) for s in ("scale", "weight_scale") if stem + s in converted.entries), None
            )
            original = source.read(key).double()
            restored = FLOAT8_E4M3FN.dequantize(converted.read(key), scale).double()
            noise += (restored - original).square().sum().item()
            signal += original.square().sum().item()
    return error_to_db((noise / signal) ** 0.5)


def table(rows: list[Row]) -> str:
    """Markdown."""
    head = (
        "| file | bytes | quantized/kept/skipped | weight SQNR | picture PSNR | opened by |\n|---|--:|---|--:|--:|---|"
    )
    lines = [f"| {r.file} | {r.size:,} | {r.counts} | {r.sqnr} | {r.psnr} | {r.opened_by} |" for r in rows]
    return "\n".join([head, *lines])


if __name__ == "__main__":
    main()
