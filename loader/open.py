"""Open V1, V2, comfy and legacy FP8 files with the FP8 weights kept in RAM and VRAM, convolutions too."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import comfy.model_detection
import comfy.model_management
import comfy.sd
import comfy.utils
import torch

from ..hswq_core import FLOAT8_DTYPES, FLOAT8_E4M3FN, FileError
from .keys import key_prefix, normalize_keys
from .ops import float8_operations

log = logging.getLogger(__name__)


def open_checkpoint(path: Path, embedding_directory: Any = None) -> tuple[Any, Any, Any]:
    """(MODEL, CLIP, VAE) of a checkpoint; text encoder and VAE load as in the stock loader.

    Raises:
        FileError: unreadable, not FP8, an unknown model, or a wrong scale.
    """
    state, metadata, options = _prepare(path)
    model, clip, vae, _ = comfy.sd.load_state_dict_guess_config(
        state, embedding_directory=embedding_directory, model_options=options, metadata=metadata
    )
    _finish(model, path, reload_checkpoint)
    return model, clip, vae


def open_diffusion_model(path: Path) -> Any:
    """MODEL of a diffusion model file (or of the diffusion model in a checkpoint).

    Raises:
        FileError: see ``open_checkpoint``.
    """
    state, metadata, options = _prepare(path)
    model = comfy.sd.load_diffusion_model_state_dict(state, model_options=options, metadata=metadata)
    _finish(model, path, reload_diffusion_model)
    return model


def reload_checkpoint(path: str, disable_dynamic: bool = False) -> Any:
    """The MODEL of a checkpoint once more: ComfyUI asks for it for torch.compile, hooks and several GPUs."""
    state, metadata, options = _prepare(Path(path))
    return comfy.sd.load_state_dict_guess_config(
        state,
        output_vae=False,
        output_clip=False,
        model_options=options,
        metadata=metadata,
        disable_dynamic=disable_dynamic,
    )[0]


def reload_diffusion_model(path: str, disable_dynamic: bool = False) -> Any:
    """The MODEL of a diffusion model file once more."""
    state, metadata, options = _prepare(Path(path))
    return comfy.sd.load_diffusion_model_state_dict(
        state, model_options=options, metadata=metadata, disable_dynamic=disable_dynamic
    )


def read_state(path: Path) -> tuple[dict[str, Any], Any, str]:
    """(state dict with normalized keys, metadata, prefix of the diffusion model)."""
    state, metadata = comfy.utils.load_torch_file(str(path), return_metadata=True)
    prefix = key_prefix(state)
    return normalize_keys(state, prefix, path.name), metadata, prefix


def operations_for(state: dict[str, Any], prefix: str, config: Any) -> tuple[type, torch.dtype]:
    """(operations class, storage dtype of the layers that are not FP8).

    Kept layers stay in the file's own 16-bit type; the compute dtype follows ComfyUI's rule for it.
    """
    sizes: Counter[torch.dtype] = Counter()
    for key, tensor in state.items():
        if key.startswith(prefix) and tensor.is_floating_point() and tensor.dtype not in FLOAT8_DTYPES:
            sizes[tensor.dtype] += tensor.numel()
    supported = config.supported_inference_dtypes
    storage = max((d for d in sizes if d.itemsize == 2), key=lambda d: sizes[d], default=supported[0])
    device = comfy.model_management.get_torch_device()
    compute = comfy.model_management.unet_manual_cast(storage, device, supported) or storage
    return float8_operations(compute), storage


def _prepare(path: Path) -> tuple[dict[str, Any], Any, dict[str, Any]]:
    state, metadata, prefix = read_state(path)
    if not any(key.startswith(prefix) and t.dtype == FLOAT8_E4M3FN.dtype for key, t in state.items()):
        raise FileError(
            f"File {path.name}",
            got="no float8_e4m3fn weight in its diffusion model",
            expected="a file converted to v1, v2 or comfy",
            remedy="Open it with ComfyUI's own loader.",
        )
    config = comfy.model_detection.model_config_from_unet(state, prefix, metadata=metadata)
    if config is None:
        raise FileError(
            f"File {path.name}",
            got="a model this ComfyUI does not recognize",
            expected="a checkpoint or diffusion model it knows",
            remedy="Update ComfyUI, or check that the file is a diffusion model.",
        )
    operations, storage = operations_for(state, prefix, config)
    return state, metadata, {"custom_operations": operations, "dtype": storage}


def _finish(model: Any, path: Path, reload: Any) -> None:
    model.cached_patcher_init = (reload, (str(path),))
    modules = model.model.diffusion_model.modules()
    counts = Counter(
        "float8" if getattr(m, "layout_type", None) else "16-bit" for m in modules if hasattr(m, "layout_type")
    )
    log.info("HSWQ: %s: %d layers in FP8, %d in 16 bits", path.name, counts["float8"], counts["16-bit"])
