"""The keys FP8 files use for a layer's scale, translated to one: ``X.weight_scale``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import comfy.model_detection
import torch

from ..hswq_core import FLOAT8_E4M3FN, FileError

SCALE = "weight_scale"
# After "X.": ours and stock, legacy stock, V2, V2 of the original project.
SCALE_SUFFIXES = (SCALE, "scale_weight", "scale", "weight.scale")
IGNORED_SUFFIXES = ("input_scale", "scale_input", "comfy_quant")
LEGACY_MARKER = "scaled_fp8"


def key_prefix(state: Mapping[str, Any]) -> str:
    """Prefix of the diffusion model's keys in a file or state dict, "" if it has none."""
    prefix: str = comfy.model_detection.unet_prefix_from_state_dict(dict(state))
    return prefix if any(key.startswith(prefix) for key in state) else ""


def normalize_keys(state: dict[str, Any], prefix: str, file_name: str) -> dict[str, Any]:
    """A state dict in which every FP8 layer under ``prefix`` has at most ``X.weight_scale`` beside it.

    ``X.scale`` counts as a scale only beside an FP8 ``X.weight``: Flux calls the weights of its norms so too.

    Raises:
        FileError: a scale without its weight's shape, or NaN, infinite, zero or negative; two scales for
            one layer; a quantization this loader does not know.
    """
    state = dict(state)
    state.pop(f"{prefix}{LEGACY_MARKER}", None)
    quantized = [
        key[: -len("weight")]
        for key, tensor in state.items()
        if key.startswith(prefix) and key.endswith(".weight") and tensor.dtype == FLOAT8_E4M3FN.dtype
    ]
    for layer in quantized:
        _require_known_format(state.get(f"{layer}comfy_quant"), layer, file_name)
        for suffix in IGNORED_SUFFIXES:
            state.pop(f"{layer}{suffix}", None)
        found = [f"{layer}{suffix}" for suffix in SCALE_SUFFIXES if f"{layer}{suffix}" in state]
        if len(found) > 1:
            raise _bad(file_name, found[1], f"a second scale beside {found[0]}", "one scale for each layer")
        for key in found:
            scale = state.pop(key)
            _require_usable(scale, state[f"{layer}weight"], key, file_name)
            state[f"{layer}{SCALE}"] = scale
    _require_owned(state, prefix, quantized, file_name)
    return state


def _require_known_format(marker: torch.Tensor | None, layer: str, file_name: str) -> None:
    if marker is None:
        return
    try:
        name = json.loads(bytes(marker.tolist()))["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise _bad(file_name, f"{layer}comfy_quant", f"unreadable JSON ({error})", "a format name") from error
    if name != FLOAT8_E4M3FN.name:
        raise _bad(file_name, f"{layer}comfy_quant", f"format {name}", FLOAT8_E4M3FN.name)


def _require_usable(scale: torch.Tensor, weight: torch.Tensor, key: str, file_name: str) -> None:
    if scale.numel() not in (1, weight.shape[0]):
        raise _bad(file_name, key, f"shape {tuple(scale.shape)}", f"1 or {weight.shape[0]} values")
    values = scale.to(torch.float32)
    if not bool((values.isfinite() & (values > 0)).all()):
        raise _bad(file_name, key, "NaN, infinity, zero or a negative number", "finite scales above 0")


def _require_owned(state: dict[str, Any], prefix: str, quantized: list[str], file_name: str) -> None:
    """A weight_scale whose weight is no FP8 tensor: the file is not what it says."""
    owned = {f"{layer}{SCALE}" for layer in quantized}
    for key in state:
        if key.startswith(prefix) and key.endswith(f".{SCALE}") and key not in owned:
            raise _bad(file_name, key, "no FP8 weight beside it", "an FP8 weight of the same layer")


def _bad(file_name: str, key: str, got: str, expected: str) -> FileError:
    return FileError(
        f"File {file_name}, tensor {key}",
        got=got,
        expected=expected,
        remedy="The file is damaged or of another kind: convert or download it again, or try a stock loader.",
    )
