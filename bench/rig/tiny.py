"""Small random model files that ComfyUI's stock loaders accept, made once and kept in the cache.

    python bench/rig/tiny.py sd15-small OUT.safetensors --set seed=1 --set parts=unet

A text encoder for SDXL is not among the parts: the smallest that loads has 0.8 G parameters.
The test node RigConditioning stands in for it (width 2048, pooled_width 1280).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":  # not this folder: its server.py would hide ComfyUI's
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from rig.environment import child_environment
from rig.tree import cache_folder, comfy_tree, tree_version

if TYPE_CHECKING:
    import torch

Options = dict[str, Any]

COMMON: Options = {"dtype": "fp16", "seed": 0}
KINDS: dict[str, Options] = {
    "flux-tiny": {"hidden": 256, "double": 1, "single": 2, "txt_dim": 768, "vec_dim": 768},
    "zimage": {"layers": 1, "txt_dim": 2560},
    "sd15-small": {"parts": "unet,clip,tiny-vae"},
    "sd15": {"parts": "unet,clip,vae"},
    "sdxl-small": {"parts": "unet"},
    "sdxl": {"parts": "unet"},
    "taesd": {"latent": 4},
    "taef": {"latent": 16},
}
SOURCES = [Path(__file__), Path(__file__).with_name("recipes.py")]
PREFIX = "model.diffusion_model."
LORA_MIN_WIDTH = 64


class TinyError(ValueError):
    """A kind, option or layer that does not exist, or a file that could not be made."""


def make(kind: str, **options: Any) -> Path:
    """The file of one kind (a key of KINDS) with these options; made on first use."""
    full = _complete(kind, options)
    tree = comfy_tree()
    path = _cached(kind, {**full, "comfyui": tree_version(tree)})
    if not path.exists():
        _make_in_child(kind, full, path)
    return path


def lora(
    kind: str,
    layers: Sequence[str] | None = None,
    *,
    rank: int = 4,
    strength: float = 0.5,
    seed: int = 0,
    **options: Any,
) -> Path:
    """A random LoRA for the file `make(kind, **options)`, under keys the stock loader knows.

    layers    names within the diffusion model; None: every matrix of at least 64 x 64
    strength  standard deviation of the change, relative to that of the weights
    """
    model = make(kind, **options)
    wish = {"layers": layers and list(layers), "rank": rank, "strength": strength, "seed": seed}
    path = _cached(f"{kind}-lora", {**wish, "model": model.stem})
    if not path.exists():
        shapes = layer_shapes(model)
        _save(_lora_state(shapes, _chosen(shapes, layers), rank, strength, seed), path)
    return path


def layer_shapes(model: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights of all Linear and Conv2d in a file's diffusion model, by name."""
    from safetensors import safe_open

    with safe_open(model, "pt") as file:
        keys = list(file.keys())
        prefix = PREFIX if any(key.startswith(PREFIX) for key in keys) else ""
        names = {key: key.removeprefix(prefix).removesuffix(".weight") for key in keys}
        wanted = [key for key in keys if key.startswith(prefix) and key.endswith(".weight")]
        shapes = {names[key]: tuple(file.get_slice(key).get_shape()) for key in wanted}
    return {name: shape for name, shape in shapes.items() if len(shape) in (2, 4)}


def _chosen(shapes: dict[str, tuple[int, ...]], layers: Sequence[str] | None) -> list[str]:
    if layers is None:
        return [n for n, s in shapes.items() if len(s) == 2 and min(s) >= LORA_MIN_WIDTH]
    unknown = [layer for layer in layers if layer not in shapes]
    if unknown:
        raise TinyError(f"LoRA layers {unknown}: not in the model, which has {list(shapes)[:20]}")
    return list(layers)


def _lora_state(
    shapes: dict[str, tuple[int, ...]], layers: list[str], rank: int, strength: float, seed: int
) -> dict[str, torch.Tensor]:
    import torch

    rng = torch.Generator().manual_seed(seed)
    state = {}
    for layer in layers:
        out, *rest = shapes[layer]
        std = 0.7 * strength / math.sqrt(math.prod(rest) * rank)  # recipes draws with 0.7
        up = torch.randn(out, rank, *[1] * (len(rest) - 1), generator=rng)
        down = torch.randn(rank, *rest, generator=rng) * std
        state[f"diffusion_model.{layer}.lora_up.weight"] = up.half()
        state[f"diffusion_model.{layer}.lora_down.weight"] = down.half()
        state[f"diffusion_model.{layer}.alpha"] = torch.tensor(float(rank))
    return state


def _complete(kind: str, options: Options) -> Options:
    if kind not in KINDS:
        raise TinyError(f"kind {kind!r}: expected one of {', '.join(KINDS)}")
    known = {**COMMON, **KINDS[kind]}
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise TinyError(f"{kind}: no option {', '.join(unknown)}, expected {', '.join(known)}")
    return {**known, **options}


def _cached(name: str, options: Options) -> Path:
    """Where a file lies: its name tells the options and the code that made it apart."""
    key = json.dumps(options, sort_keys=True).encode()
    code = b"".join(source.read_bytes() for source in SOURCES)
    folder = cache_folder() / "models"
    folder.mkdir(exist_ok=True)
    return folder / f"{name}-{hashlib.sha256(key + code).hexdigest()[:10]}.safetensors"


def _make_in_child(kind: str, options: Options, path: Path) -> None:
    """Build in a process of its own, so that ComfyUI is not imported into this one."""
    command = [sys.executable, str(SOURCES[0]), kind, str(path)]
    command += [word for key, value in options.items() for word in ("--set", f"{key}={value}")]
    done = subprocess.run(command, env=child_environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise TinyError(f"{kind}: not made ({done.returncode}):\n{done.stderr[-3000:]}")


def _save(state: dict[str, torch.Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    handle, scratch = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    os.close(handle)
    try:
        save_file(state, scratch, metadata={"made_by": "HSWQ test rig"})
        Path(scratch).replace(path)
    finally:
        Path(scratch).unlink(missing_ok=True)


def _main() -> None:
    parser = argparse.ArgumentParser(description="Make one small random model file.")
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("out", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="OPTION=VALUE")
    arguments = parser.parse_args()
    given = dict(pair.split("=", 1) for pair in arguments.set)
    known = {**COMMON, **KINDS[arguments.kind]}
    typed = {key: type(known.get(key, ""))(value) for key, value in given.items()}
    full = _complete(arguments.kind, typed)

    from rig.inprocess import load_comfy

    load_comfy()
    from rig.recipes import build

    _save(build(arguments.kind, full), arguments.out.resolve())


if __name__ == "__main__":
    _main()
