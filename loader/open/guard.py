"""Warns at stock loaders that are about to open what only HSWQ Loader can read.

ComfyUI's own loaders take the codes of a V2 file for weights: the picture is noise or black, and the only hint is a
list of unexpected keys in the log.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path

import folder_paths

from ...hswq_core.errors import FileError
from ...hswq_core.files.checkpoint import read_header
from ...hswq_core.model.layer import WEIGHT
from ...hswq_core.plan.formats import V2_SCALES
from ...hswq_core.quant.grid import FLOAT8_DTYPES
from ..stamp import Stamp

log = logging.getLogger(__name__)

# Stock loader -> (its input, model folder, the loader to take instead).
STOCK = {
    "CheckpointLoaderSimple": ("ckpt_name", "checkpoints", "HSWQ Loader"),
    "UNETLoader": ("unet_name", "diffusion_models", "HSWQ Diffusion Model Loader"),
}
# Answers cached: each run asks again about files that hardly ever change.
CACHED = 256


def warnings(prompt: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """(node id, text) for every stock loader of an API-format prompt that would misread its file."""
    for node_id, node in prompt.items():
        if not isinstance(node, Mapping):
            continue
        kind, inputs = node.get("class_type"), node.get("inputs")
        if kind not in STOCK or not isinstance(inputs, Mapping):
            continue
        widget, folder, instead = STOCK[kind]
        name = inputs.get(widget)
        if isinstance(name, str) and _misread(folder, name):
            # The node shows two lines of it: the remedy comes first.
            yield str(node_id), f"Use {instead}: this loader misreads V2 files as noise ({name})."


def _misread(folder: str, name: str) -> bool:
    path = folder_paths.get_full_path(folder, name)
    if path is None or Path(path).suffix != ".safetensors":
        return False
    try:
        return _only_ours(Path(path), Stamp.of(Path(path)))
    except FileError:
        return False  # the loader itself says what is wrong with the file


@lru_cache(maxsize=CACHED)
def _only_ours(path: Path, _stamp: Stamp) -> bool:
    """Whether an FP8 weight of the file with this stamp has its scale where stock loaders do not look."""
    entries = read_header(path)[1]
    codes = (key for key, info in entries.items() if key.endswith(WEIGHT) and info.dtype in FLOAT8_DTYPES)
    return any(f"{key.removesuffix(WEIGHT)}.{suffix}" in entries for key in codes for suffix in V2_SCALES)


def watcher(show: Callable[[str, str], None]) -> Callable[[dict[str, object]], dict[str, object]]:
    """A handler for ``PromptServer.add_on_prompt_handler``: warns in the log, and by ``show`` (text, node id)."""

    def on_prompt(data: dict[str, object]) -> dict[str, object]:
        prompt = data.get("prompt")
        for node_id, text in warnings(prompt if isinstance(prompt, Mapping) else {}):
            log.warning("HSWQ: %s", text)
            show(text, node_id)
        return data

    return on_prompt
