"""A warning at stock loaders that are about to open what only HSWQ Loader can read.

ComfyUI's own loaders take the codes of a V2 file for weights: the picture is noise or black, and all they say is a list
of unexpected keys in the log.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import folder_paths

from ..hswq_core import FLOAT8_DTYPES, FileError
from ..hswq_core.checkpoint import TensorInfo, read_header

log = logging.getLogger(__name__)

WEIGHT = ".weight"
# Scales under names that ComfyUI's loaders do not read: this pack's and the original project's, see ``layers``.
ONLY_OURS = (".scale", ".weight.scale")
# Stock loader -> (its input, model folder, the loader to take instead).
STOCK = {
    "CheckpointLoaderSimple": ("ckpt_name", "checkpoints", "HSWQ Loader"),
    "UNETLoader": ("unet_name", "diffusion_models", "HSWQ Diffusion Model Loader"),
}


def only_ours(entries: Mapping[str, TensorInfo]) -> bool:
    """Whether an FP8 weight has its scale where stock loaders do not look."""
    weights = (key[: -len(WEIGHT)] for key, info in entries.items() if key.endswith(WEIGHT) and is_float8(info))
    return any(f"{stem}{suffix}" in entries for stem in weights for suffix in ONLY_OURS)


def is_float8(info: TensorInfo) -> bool:
    """Whether a tensor is stored in a float8 type."""
    return info.dtype in FLOAT8_DTYPES


def warnings(prompt: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(node id, text) for every stock loader of an API-format prompt that would misread its file."""
    for node_id, node in prompt.items():
        kind = node.get("class_type") if isinstance(node, Mapping) else None
        if kind not in STOCK or not isinstance(node.get("inputs"), Mapping):
            continue
        widget, folder, instead = STOCK[kind]
        name = node["inputs"].get(widget)
        if isinstance(name, str) and _misread(folder, name):
            # The node shows two lines of it: the remedy comes first.
            yield str(node_id), f"Use {instead}: this loader misreads V2 files as noise ({name})."


def _misread(folder: str, name: str) -> bool:
    path = folder_paths.get_full_path(folder, name)
    if path is None or Path(path).suffix != ".safetensors":
        return False
    try:
        return only_ours(read_header(Path(path))[1])
    except FileError:
        return False  # the loader itself says what is wrong with the file


def watcher(show: Callable[[str, str], None]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A handler for ``PromptServer.add_on_prompt_handler``: warns in the log, and by ``show`` (text, node id)."""

    def on_prompt(data: dict[str, Any]) -> dict[str, Any]:
        prompt = data.get("prompt")
        for node_id, text in warnings(prompt if isinstance(prompt, Mapping) else {}):
            log.warning("HSWQ: %s", text)
            show(text, node_id)
        return data

    return on_prompt
