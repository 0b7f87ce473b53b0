"""Files that other tools make from a reference model: convert-to-quant's command line, and ComfyUI's INT8 layout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from judge.subject import Subject

PEERS = Path(__file__).with_name("peers.txt")
LAYOUT, FORMAT = "TensorWiseINT8Layout", "int8_tensorwise"
# Layers that INT8 packs exclude by hand, as name prefixes. Source: ComfyUI-INT8-Fast's lists for Flux and Z-Image; it
# has none for SDXL, where all Linear layers are quantized and convolutions never are.
INT8_KEPT = {
    "sdxl": (),
    "flux": ("img_in", "time_in", "guidance_in", "txt_in", "final_layer"),
    "zimage": ("cap_embedder", "t_embedder", "x_embedder", "context_refiner", "final_layer", "noise_refiner"),
}


class PeerError(RuntimeError):
    """A peer's tool is missing or failed."""


def convert_to_quant(subject: Subject) -> Path:
    """FP8 with learned rounding at the tool's defaults, in the layout stock ComfyUI opens.

    Raises:
        PeerError: the tool is not installed, or ended with an error.
    """
    # `convert_to_quant` beside this Python, where `nox -s quality` installed it
    tool = shutil.which("convert_to_quant", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if tool is None:
        raise PeerError(f"convert_to_quant: not installed; run `nox -s quality`, or pip install -r {PEERS.name}")
    target = _target(subject, "convert_to_quant")
    command = [tool, "-i", str(subject.reference.file), "-o", str(target)]
    command += ["--comfy_quant", "--device", "cpu", "--manual_seed", "0"]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **threads})
    if done.returncode or not target.exists():
        raise PeerError(f"{' '.join(command)}: exit {done.returncode}\n{done.stderr[-2000:]}")
    return target


def int8_convrot(subject: Subject) -> Path:
    """Linears in ComfyUI's INT8 layout, rotated in groups, with one scale per row; the rest stays as it is.

    ComfyUI 0.30 rounds the activations of such layers to 8 bits too, even where a file asks for
    ``full_precision_matrix_mult``: the measured output of the layer is the same with and without it.
    """
    from comfy.quant_ops import QuantizedTensor

    state = load_file(subject.reference.file)
    written = {}
    for key, tensor in state.items():
        if key.endswith(".weight") and tensor.dim() == 2 and not key.startswith(INT8_KEPT[subject.reference.name]):
            group = _group(tensor.shape[1])
            layout = QuantizedTensor.from_float(
                tensor.float(), LAYOUT, per_channel=True, convrot=True, convrot_groupsize=group
            )
            marker = {"format": FORMAT, "convrot": True, "convrot_groupsize": group}
            written |= layout.state_dict(key)
            written[f"{key[: -len('weight')]}comfy_quant"] = torch.tensor(
                list(json.dumps(marker).encode()), dtype=torch.uint8
            )
        else:
            written[key] = tensor
    target = _target(subject, "int8_convrot")
    with safe_open(subject.reference.file, "pt") as file:
        save_file({k: t.contiguous() for k, t in written.items()}, target, metadata=file.metadata())
    return target


def _group(columns: int) -> int:
    """The largest rotation that fits: ComfyUI's 256 if possible, otherwise the next smaller power of 4 that divides."""
    return next(size for size in (256, 64, 16, 4) if columns % size == 0)


def _target(subject: Subject, name: str) -> Path:
    from hswq.loader.job import output_folder

    folder = Path(output_folder(whole=False))
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{subject.reference.name}_{name}.safetensors"
    target.unlink(missing_ok=True)
    return target
