"""HSWQ Loader against ComfyUI's own with a plain FP8 file: memory, time to load, time per call, LoRAs.

    nox -s bench -- loader.py --models sd15 sdxl-small flux-tiny --threads 2

Random weights. Ours opens a v2 file (hswq, keep 0.1); ComfyUI's loader (weight_dtype fp8_e4m3fn) opens a plain v1 file
of all layers, and once a scaled one, in comfy format. Times are paired, in alternating order, and given as the median
ratio of the pairs. Memory is that of a fresh process, which imports ComfyUI's model classes at its first load; "once
more" is with the first model still open. With a GPU: `--device cuda --latent 128 --batch 4`.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rig import inprocess, pack, tiny
from rig.environment import child_environment

FORMATS = {"ours": ("v2", 0.1), "stock": ("v1", 0.0), "scaled": ("comfy", 0.1)}
COLUMNS = {
    "file": "file, MB",
    "loaded": "resident after load / file",
    "sampled": "after sampling / file",
    "peak": "peak of RAM while loading / file",
    "peak_again": "while loading once more / file",
    "load": "time to load / stock",
    "load_ms": "that is, ms",
    "load_scaled": "ComfyUI's own on a scaled file / stock",
    "first": "load and first call / stock",
    "call": "time of a call / stock",
    "lora": "with LoRA / stock with LoRA",
}


def main() -> None:
    """One row for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=sorted(tiny.KINDS), default=["sd15", "sdxl-small", "flux-tiny"])
    parser.add_argument("--latent", type=int, default=64, help="side of the latent: 64 is a picture of 512 x 512")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rank", type=int, default=16, help="of the LoRA, on every matrix of at least 64 x 64")
    parser.add_argument("--repeats", type=int, default=5, help="pairs")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.child:
        print(json.dumps(CHILDREN[options.child[0]](Path(options.child[1]), options)))
        return
    print("| model | " + " | ".join(COLUMNS.values()) + " |\n|---|" + "--:|" * len(COLUMNS))
    for kind in options.models:
        row = measured(kind)
        print(f"| {kind} | " + " | ".join(f"{row[key]:.3g}" for key in COLUMNS) + " |", flush=True)


def measured(kind: str) -> dict[str, float]:
    """One row, with each step in a fresh process."""
    with TemporaryDirectory() as folder:
        row: dict[str, float] = {}
        for step in CHILDREN:
            command = [sys.executable, *sys.argv, "--models", kind, "--child", step, folder]
            done = subprocess.run(command, env=child_environment(), capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"{kind}, {step}:\n{done.stderr[-3000:]}")
            row |= json.loads(done.stdout.splitlines()[-1])
    return row


def _start(options: argparse.Namespace) -> str:
    inprocess.load_comfy(cpu=options.device == "cpu")
    pack.alias()
    torch.set_grad_enabled(False)
    return str(options.models[0])


def make_files(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Both files, by the Converter."""
    kind = _start(options)
    import folder_paths
    from hswq.loader.calibration.model import calibrated
    from hswq.loader.convert.model import Request, convert_model
    from hswq.loader.sessions.store import path_of

    folder_paths.set_output_directory(str(folder))
    with torch.inference_mode():
        model = inprocess.load_model(tiny.make(kind))
        inprocess.sample(calibrated(model, path_of("bench"), 1000, lambda _text: None), steps=1)
        for who, (name, ratio) in FORMATS.items():
            request = Request("bench", name, "hswq", keep_ratio=ratio)
            convert_model(model, None, None, request, lambda *_: None).path.rename(folder / f"{who}.safetensors")
    return {}


def measure_memory(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Weights in memory, and the peak of the process, relative to the file's tensors."""
    _start(options)
    from hswq.hswq_core.files.checkpoint import read_header

    path = folder / "ours.safetensors"
    size = sum(info.nbytes for info in read_header(path)[1].values())
    with torch.inference_mode():
        (model, peak), (_, again) = opened_with_peak(path), opened_with_peak(path)
        loaded = resident(model)
        inprocess.sample(model, size=options.latent, steps=1)
        row = {"loaded": loaded, "sampled": resident(model), "peak": peak, "peak_again": again}
        return {"file": size / 1e6, **{key: value / size for key, value in row.items()}}


def opened_with_peak(path: Path) -> tuple[Any, int]:
    """The opened model, and by how many bytes the process grew while opening it."""
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    model = inprocess.open_fp8(path)
    return model, _memory("VmHWM") - before


def measure_time(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Ratios ours / stock, medians of pairs."""
    kind = _start(options)
    import comfy.sd
    from safetensors.torch import load_file

    paths = {who: folder / f"{who}.safetensors" for who in FORMATS}
    openers: dict[str, Callable[[Path], Any]] = {
        "ours": inprocess.open_fp8,
        "stock": opened_stock,
        "scaled": inprocess.load_model,
    }
    lora = load_file(tiny.lora(kind, rank=options.rank))

    def opened(who: str) -> Any:
        return openers[who](paths[who])

    def patched(who: str) -> Any:
        return comfy.sd.load_lora_for_models(opened(who), None, lora, 1.0, 0.0)[0]

    def called(model: Any) -> None:
        inprocess.call(model, size=options.latent, batch=options.batch, tokens=77)
        if options.device == "cuda":
            torch.cuda.synchronize()

    def first(who: str) -> None:
        called(_loaded(opened(who)))

    with torch.inference_mode():
        load, seconds = paired(opened, options.repeats)
        scaled, _ = paired(opened, options.repeats, who="scaled")
        ratios = {"load": load, "load_ms": seconds * 1000, "load_scaled": scaled}
        ratios["first"] = paired(first, options.repeats)[0]
        for key, make in (("call", opened), ("lora", patched)):
            models = {who: _loaded(make(who)) for who in ("ours", "stock")}
            ratios[key] = paired(lambda who, models=models: called(models[who]), options.repeats)[0]
            del models
    return ratios


def _loaded(model: Any) -> Any:
    """The model with its patches, on the device where it computes."""
    import comfy.model_management

    comfy.model_management.load_models_gpu([model])
    return model


def paired(run: Callable[[str], Any], repeats: int, who: str = "ours") -> tuple[float, float]:
    """Medians over pairs, in alternating order: seconds of ``who`` divided by those of "stock", and seconds of ``who``.

    The first pair is a warm-up.
    """
    ratios, own = [], []
    for index in range(repeats + 1):
        seconds = {}
        for each in sorted((who, "stock"), reverse=index % 2 == 1):
            gc.collect()
            begin = time.perf_counter()
            run(each)
            seconds[each] = time.perf_counter() - begin
        ratios.append(seconds[who] / seconds["stock"])
        own.append(seconds[who])
    return median(ratios[1:]), median(own[1:])


def opened_stock(path: Path) -> Any:
    """Opened with Load Diffusion Model, weight_dtype fp8_e4m3fn."""
    return inprocess.load_model(path, dtype=torch.float8_e4m3fn)


def resident(model: Any) -> int:
    """Bytes of all weights of a model."""
    total = 0
    for parameter in model.model.diffusion_model.parameters():
        codes = getattr(parameter, "_qdata", None)
        total += parameter.nbytes if codes is None else codes.nbytes + parameter._params.scale.nbytes
    return total


def _memory(what: str) -> int:
    """Bytes, from the kernel's accounting of this process."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{what}:"))


CHILDREN = {"files": make_files, "memory": measure_memory, "time": measure_time}


if __name__ == "__main__":
    main()
