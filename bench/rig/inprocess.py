"""The real ComfyUI inside this Python process, without a server, on the CPU unless told otherwise.

Load and sample a model within one `torch.inference_mode()`, as the server does: quantized
tensors made outside it cannot be used inside.
"""

from __future__ import annotations

import atexit
import importlib
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rig.tree import cache_folder, comfy_tree

MODULES = ("model_management", "model_patcher", "sample", "samplers", "sd", "utils")
# For each class of loaded model: widths of the context and of the pooled vector (0: none).
WIDTHS = {"Flux": (768, 768), "BaseModel": (768, 0), "SDXL": (2048, 1280), "Lumina2": (2560, 0)}

_loaded: dict[str, Any] = {}


def load_comfy(args: Sequence[str] = (), *, cpu: bool = True) -> Path:
    """Import ComfyUI with these command-line switches (and `--cpu`, unless told not to); returns its tree.

    Calling it again with the same switches does nothing; with others it raises RuntimeError,
    since ComfyUI reads them once per process.
    """
    if _loaded:
        if _loaded["args"] != tuple(args):
            raise RuntimeError(f"ComfyUI is loaded with {_loaded['args']}, not {tuple(args)}")
        return Path(_loaded["tree"])
    tree = comfy_tree()
    sys.path.insert(0, str(tree))
    sys.pycache_prefix = str(cache_folder() / "pycache")
    _parse_switches([*(["--cpu"] if cpu else []), "--base-directory", _base_directory(), *args])
    for name in MODULES:
        importlib.import_module(f"comfy.{name}")
    _loaded.update(args=tuple(args), tree=tree)
    return tree


def load_model(path: Path, **model_options: Any) -> Any:
    """The diffusion model of a file, opened with the stock loader: a ModelPatcher."""
    import comfy.sd

    return comfy.sd.load_diffusion_model(str(path), model_options=model_options)


def open_fp8(path: Path, **options: Any) -> Any:
    """The diffusion model of a file, opened with HSWQ Diffusion Model Loader: a ModelPatcher."""
    from hswq.loader.open.open import open_diffusion_model
    from hswq.loader.open.options import Opening

    return open_diffusion_model(path, Opening(**options))


def conditioning(width: int, pooled: int = 0, tokens: int = 8, seed: int = 1) -> list[Any]:
    """Random CONDITIONING: context [1, tokens, width] and, unless 0, a pooled vector [1, pooled]."""
    rng = torch.Generator().manual_seed(seed)
    context = torch.randn(1, tokens, width, generator=rng)
    extra = {"pooled_output": torch.randn(1, pooled, generator=rng)} if pooled else {}
    return [[context, extra]]


def sample(
    model: Any,
    *,
    steps: int = 2,
    size: int = 8,
    batch: int = 1,
    cfg: float = 3.0,
    seed: int = 0,
    widths: tuple[int, int] | None = None,
    sampler: str = "euler",
    scheduler: str = "normal",
    tokens: tuple[int, int] = (8, 8),
    prompt: int = 0,
    **extra: Any,
) -> torch.Tensor:
    """Latents [batch, channels, size, size] sampled from a ModelPatcher with random conditioning.

    widths of context and pooled vector: by default those of the model's class in WIDTHS; `extra` (control, hooks) goes
    to the positive conditioning.
    """
    import comfy.sample

    width, pooled = widths or WIDTHS[type(model.model).__name__]
    positive = conditioning(width, pooled, tokens[0], seed=2 * prompt + 1)
    positive[0][1].update(extra)
    negative = conditioning(width, pooled, tokens[1], seed=2 * prompt + 2)
    with torch.inference_mode():
        latent = torch.zeros(batch, model.model.latent_format.latent_channels, size, size)
        noise = comfy.sample.prepare_noise(latent, seed)
        settings = (steps, cfg, sampler, scheduler, positive, negative, latent)
        drawn = comfy.sample.sample(model, noise, *settings, disable_pbar=True, seed=seed)
    return torch.as_tensor(drawn)


def call(model: Any, *, size: int = 8, batch: int = 1, tokens: int = 8, seed: int = 0) -> torch.Tensor:
    """The prediction of one call [batch, channels, size, size] of a ModelPatcher as currently loaded, on its device."""
    inner, settings = model.model, model.model.model_config.unet_config
    rng = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng).to(model.load_device)

    x = noise(batch, inner.latent_format.latent_channels, size, size)
    pooled = settings.get("adm_in_channels") or settings.get("vec_in_dim") or 0
    extra = {"y": noise(batch, pooled)} if pooled else {}
    if settings.get("guidance_embed"):
        extra["guidance"] = torch.full((batch,), 3.5, device=model.load_device)
    context = noise(batch, tokens, WIDTHS[type(inner).__name__][0])
    with torch.inference_mode():
        sigma = torch.full((batch,), 0.7, device=model.load_device)
        predicted: torch.Tensor = inner.apply_model(x, sigma, c_crossattn=context, **extra)
    return predicted


def _parse_switches(args: list[str]) -> None:
    """Let ComfyUI parse `args` as if they were its command line."""
    argv, sys.argv = sys.argv, ["main.py", *args]
    try:
        importlib.import_module("comfy.options").enable_args_parsing()
        importlib.import_module("comfy.cli_args")
    finally:
        sys.argv = argv


def _base_directory() -> str:
    folder = tempfile.mkdtemp(prefix="hswq-inprocess-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
