"""Full-size random files with real key names, written tensor by tensor: the model is never in memory as a whole.

Key names and shapes come from ComfyUI's own classes on the meta device, in this process.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from rig.inprocess import load_comfy
from rig.tree import cache_folder

DTYPE = torch.float16
Shapes = dict[str, tuple[int, ...]]


def make(kind: str) -> Path:
    """The file for a key of ``KINDS``, made on first use."""
    from hswq.hswq_core.files.checkpoint import TensorInfo
    from hswq.hswq_core.files.writing import OutputTensor, write_checkpoint
    from hswq.hswq_core.progress import no_progress

    path = cache_folder() / "models" / f"large-{kind}.safetensors"
    if not path.exists():
        load_comfy()
        rng = torch.Generator().manual_seed(0)
        shapes = KINDS[kind]()
        outputs = [
            OutputTensor(key, TensorInfo(DTYPE, shape), partial(_random, key, shape, rng))
            for key, shape in shapes.items()
        ]
        write_checkpoint(path, outputs, {"made_by": "HSWQ test rig"}, progress=no_progress)
    return path


def _random(key: str, shape: tuple[int, ...], rng: torch.Generator) -> torch.Tensor:
    """Norms are the identity, biases 0, embeddings N(0, 1), matrices N(0, 0.7/sqrt(fan in))."""
    if len(shape) < 2:
        return (torch.zeros if key.endswith("bias") else torch.ones)(shape, dtype=DTYPE)
    std = 1.0 if "shared" in key or "embed" in key else 0.7 / math.sqrt(math.prod(shape[1:]))
    return torch.randn(shape, generator=rng).mul_(std).to(DTYPE)


def _shapes(module: torch.nn.Module, prefix: str = "") -> Iterator[tuple[str, tuple[int, ...]]]:
    return ((prefix + key, tuple(tensor.shape)) for key, tensor in module.state_dict().items())


def flux() -> Shapes:
    """Flux at its real width with 9 + 18 of its 19 + 38 blocks: 11 GB."""
    import comfy.ldm.flux.model
    import comfy.ops

    module = comfy.ldm.flux.model.Flux(
        image_model="flux",
        in_channels=16,
        out_channels=16,
        patch_size=2,
        vec_in_dim=768,
        context_in_dim=4096,
        hidden_size=3072,
        num_heads=24,
        depth=9,
        depth_single_blocks=18,
        mlp_ratio=4.0,
        axes_dim=[16, 56, 56],
        theta=10000,
        qkv_bias=True,
        guidance_embed=True,
        txt_ids_dims=[],
        dtype=DTYPE,
        device=torch.device("meta"),
        operations=comfy.ops.disable_weight_init,
    )
    return {key.replace("_norm.weight", "_norm.scale"): shape for key, shape in _shapes(module)}


def t5xxl() -> Shapes:
    """T5-XXL's whole encoder, as in trained files: with the copy of its embedding, lm_head and a decoder (of one block
    instead of 24).
    """
    import comfy.ops
    import comfy.text_encoders.t5

    config = json.loads((load_comfy() / "comfy/text_encoders/t5_config_xxl.json").read_text(encoding="utf-8"))
    module = comfy.text_encoders.t5.T5(config, DTYPE, torch.device("meta"), comfy.ops.disable_weight_init)
    shapes = dict(_shapes(module))
    words = shapes["shared.weight"]
    first = {key: shape for key, shape in shapes.items() if key.startswith("encoder.block.0.")}
    decoder = {f"decoder{key.removeprefix('encoder')}": shape for key, shape in first.items()}
    return {**shapes, "encoder.embed_tokens.weight": words, **decoder, "lm_head.weight": words}


KINDS: dict[str, Callable[[], Shapes]] = {"flux": flux, "t5xxl": t5xxl}
