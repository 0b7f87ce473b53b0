"""T5-XXL at its real size: converted file to file, opened by ComfyUI's CLIPLoader node, and how the output changes.

    nox -s bench -- text_encoder.py

Random weights, with the decoder, lm_head and copy of the embedding that trained files have. Prints whether any key was
missing or unexpected, and compares the encoded prompt with the FP16 file's.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rig import large, pack
from rig.inprocess import load_comfy

pack.alias()

from convert import watched  # noqa: E402

PROMPT = "a lighthouse on a cliff at dusk, long exposure"


class Heard(logging.Handler):
    """What ComfyUI logs about keys."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep lines about missing and unexpected keys."""
        text = record.getMessage()
        if "missing" in text or "unexpected" in text:
            self.lines.append(text)


def main() -> None:
    """Print one line for each type."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", default=["sd3", "flux"])
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    source = large.make("t5xxl")
    load_comfy()
    with TemporaryDirectory(dir=source.parent) as name:
        folder = Path(name)
        wish = ["--method", "nearest", "--format", "comfy", "--preset", "encoder_only", "-o", str(folder)]
        seconds, peak = watched(["convert", str(source), *wish], options.threads)
        (made,) = folder.glob("*.safetensors")
        sizes = f"{source.stat().st_size / 1e9:.2f} GB to {made.stat().st_size / 1e9:.2f} GB"
        print(f"t5xxl, {sizes}, {seconds:.0f} s, peak {peak / 1e6:.0f} MB of its own", flush=True)
        for kind in options.types:
            began = time.perf_counter()
            encoded, heard = opened(made, kind)
            took = time.perf_counter() - began
            original, _ = opened(source, kind)
            change = ((encoded - original).norm() / original.norm()).item()
            finite = bool(encoded.isfinite().all())
            print(f"CLIPLoader {kind}: {heard or 'no missing, no unexpected key'}; finite {finite}; ", end="")
            print(f"{took:.0f} s to load and encode; change of the encoded prompt {change:.3f}", flush=True)


def opened(path: Path, kind: str) -> tuple[torch.Tensor, list[str]]:
    """(the encoded prompt, log lines about keys) from the CLIPLoader node."""
    import folder_paths

    nodes: Any = importlib.import_module("nodes")
    folder_paths.add_model_folder_path("text_encoders", str(path.parent))
    heard, root = Heard(), logging.getLogger()
    others, root.handlers = root.handlers, [heard]
    root.setLevel(logging.DEBUG)
    try:
        with torch.inference_mode():
            (clip,) = nodes.CLIPLoader().load_clip(path.name, kind)
            encoded = clip.encode_from_tokens(clip.tokenize(PROMPT)).clone()
    finally:
        root.handlers = others
        root.setLevel(logging.WARNING)
    return encoded, heard.lines


if __name__ == "__main__":
    main()
