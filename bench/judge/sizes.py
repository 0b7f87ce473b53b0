"""Bytes of a file, counted from its header."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def sizes(path: Path, source: Path) -> dict[str, Any]:
    """Bytes of a file compared with its source with every layer in 8 bits and no scales."""
    from hswq.hswq_core.files.checkpoint import read_header

    entries, found = read_header(source)[1], read_header(path)[1]
    weights = [key for key, info in entries.items() if key.endswith(".weight") and len(info.shape) in (2, 4)]
    total = sum(info.nbytes for info in entries.values())
    smallest = total - sum(entries[key].nbytes for key in weights) // 2  # the source is FP16
    eight = [key for key in weights if found[key].dtype.itemsize == 1]
    stems = tuple(key[: -len("weight")] for key in eight)
    beside = ("weight", "scale", "weight_scale", "comfy_quant", "input_scale")
    mine = {stem + name for stem in stems for name in beside}
    return {
        "extra": sum(info.nbytes for info in found.values()) / smallest - 1,
        "quantized_bytes": sum(info.nbytes for key, info in found.items() if key in mine),
        "quantized": len(eight),
        "layers": len(weights),
    }
