"""How the small random checkpoints are built; runs where ComfyUI is importable (see tiny.py).

Key names and shapes come from ComfyUI's own model classes on the meta device; values are
random, scaled such that activations stay finite. What a model must keep so that the stock
loaders recognize it: Flux a hidden width that is a multiple of 128; Z-Image width 3840 (and
4 refiner blocks: 0.9 G parameters is the smallest); SD1.5 and SDXL 320 channels and their
context width, SDXL also its transformer depths.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

State = dict[str, torch.Tensor]
Options = Mapping[str, Any]

META = torch.device("meta")
UNET_PREFIX = "model.diffusion_model."
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}

UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "use_spatial_transformer": True,
    "legacy": False,
    "use_temporal_attention": False,
    "use_temporal_resblock": False,
}
SDXL = UNET | {
    "num_classes": "sequential",
    "adm_in_channels": 2816,
    "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 2, 4],
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_middle": 10,
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "use_linear_in_transformer": True,
    "context_dim": 2048,
    "num_head_channels": 64,
}
SD15 = UNET | {
    "adm_in_channels": None,
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "use_linear_in_transformer": False,
    "context_dim": 768,
    "num_heads": 8,
}
SD15_SMALL = SD15 | {
    "num_res_blocks": [1, 1],
    "channel_mult": [1, 1],
    "transformer_depth": [1, 0],
    "transformer_depth_output": [1, 1, 0, 0],
}
ZIMAGE = {
    "patch_size": 2,
    "in_channels": 16,
    "dim": 3840,
    "n_heads": 30,
    "n_kv_heads": 30,
    "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512],
    "rope_theta": 256.0,
    "ffn_dim_multiplier": 8.0 / 3.0,
    "qk_norm": True,
    "z_image_modulation": True,
    "time_scale": 1000.0,
    "pad_tokens_multiple": 32,
}
AUTOENCODER = {
    "double_z": True,
    "z_channels": 4,
    "resolution": 256,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 128,
    "ch_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_resolutions": [],
    "dropout": 0.0,
}


def random_state(module: torch.nn.Module, dtype: torch.dtype, rng: torch.Generator) -> State:
    """A random state dict for a module that lives on the meta device."""
    state = {}
    for prefix, child in module.named_modules():
        own = [*child.named_parameters(recurse=False), *child.named_buffers(recurse=False)]
        for name, tensor in own:
            value = _random(type(child).__name__, name, tensor, rng)
            state[f"{prefix}.{name}" if prefix else name] = value.contiguous()
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()}


def _random(cls: str, name: str, like: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Norms are the identity, biases 0, matrices N(0, 0.7/sqrt(fan in)), the rest N(0, 0.02)."""
    shape = tuple(like.shape)
    if not like.is_floating_point():  # position ids
        return torch.arange(shape[-1]).expand(shape)
    if "Norm" in cls:
        return torch.ones(shape) if name == "weight" else torch.zeros(shape)
    if name == "bias":
        return torch.zeros(shape)
    narrow = "Embedding" in cls or len(shape) < 2
    std = 0.02 if narrow else 0.7 / math.sqrt(math.prod(shape[1:]))
    return torch.randn(shape, generator=rng).mul_(std)


def _prefixed(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


# ----- parts


def unet(config: dict[str, Any], dtype: torch.dtype, rng: torch.Generator) -> State:
    """An SD UNet, keys without prefix."""
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    ops = comfy.ops.disable_weight_init
    return random_state(UNetModel(**config, dtype=dtype, device=META, operations=ops), dtype, rng)


def clip_l(dtype: torch.dtype, rng: torch.Generator) -> State:
    """SD1.5's text encoder, under the names of a checkpoint (123 M parameters)."""
    import comfy.sd1_clip
    import comfy.supported_models

    state = random_state(comfy.sd1_clip.SD1ClipModel(device=META, dtype=dtype), dtype, rng)
    for key in [key for key in state if key.endswith("logit_scale")]:
        state[key] = torch.tensor(4.6055, dtype=dtype)
    names = comfy.supported_models.SD15(dict(SD15))
    return dict(names.process_clip_state_dict_for_saving(state))


def autoencoder(dtype: torch.dtype, rng: torch.Generator) -> State:
    """The VAE of SD1.5 and SDXL (84 M parameters), keys without prefix."""
    from comfy.ldm.models.autoencoder import AutoencoderKL

    with META:
        module = AutoencoderKL(ddconfig=AUTOENCODER, embed_dim=4)
    return random_state(module, dtype, rng)


def tiny_autoencoder(latent: int, dtype: torch.dtype, rng: torch.Generator) -> State:
    """A TAESD (2.5 M parameters): a VAE of its own, or in a checkpoint."""
    from comfy.taesd.taesd import TAESD

    with META:
        module = TAESD(latent_channels=latent)
    state = random_state(module, dtype, rng)
    scale = {"vae_scale": torch.tensor(1.0), "vae_shift": torch.tensor(0.0)}
    return state | {key: value.to(dtype) for key, value in scale.items()}


# ----- files


def checkpoint(config: dict[str, Any]) -> Callable[..., State]:
    """Builder of a checkpoint with the option `parts`: of unet, clip, vae, tiny-vae."""

    def build(options: Options, dtype: torch.dtype, rng: torch.Generator) -> State:
        makers: dict[str, Callable[[], State]] = {
            "unet": lambda: _prefixed(UNET_PREFIX, unet(config, dtype, rng)),
            "clip": lambda: clip_l(dtype, rng),
            "vae": lambda: _prefixed("first_stage_model.", autoencoder(dtype, rng)),
            "tiny-vae": lambda: _prefixed("first_stage_model.", tiny_autoencoder(4, dtype, rng)),
        }
        state: State = {}
        for part in options["parts"].split(","):
            state |= makers[part]()
        return state

    return build


def flux(options: Options, dtype: torch.dtype, rng: torch.Generator) -> State:
    """A Flux transformer; like in the original files its q/k norms are called `scale`."""
    import comfy.ldm.flux.model
    import comfy.ops

    module = comfy.ldm.flux.model.Flux(
        image_model="flux",
        in_channels=16,
        out_channels=16,
        patch_size=2,
        vec_in_dim=options["vec_dim"],
        context_in_dim=options["txt_dim"],
        hidden_size=options["hidden"],
        num_heads=options["hidden"] // 128,
        depth=options["double"],
        depth_single_blocks=options["single"],
        mlp_ratio=4.0,
        axes_dim=[16, 56, 56],
        theta=10000,
        qkv_bias=True,
        guidance_embed=True,
        txt_ids_dims=[],
        dtype=dtype,
        device=META,
        operations=comfy.ops.disable_weight_init,
    )
    state = random_state(module, dtype, rng)
    return {key.replace("_norm.weight", "_norm.scale"): value for key, value in state.items()}


def zimage(options: Options, dtype: torch.dtype, rng: torch.Generator) -> State:
    """A Z-Image transformer."""
    import comfy.ldm.lumina.model
    import comfy.ops

    module = comfy.ldm.lumina.model.NextDiT(
        **ZIMAGE,
        n_layers=options["layers"],
        cap_feat_dim=options["txt_dim"],
        dtype=dtype,
        device=META,
        operations=comfy.ops.disable_weight_init,
    )
    return random_state(module, dtype, rng)


def taesd(options: Options, dtype: torch.dtype, rng: torch.Generator) -> State:
    """A VAE file for `Load VAE`; option `latent`: channels."""
    return tiny_autoencoder(options["latent"], dtype, rng)


BUILDERS: dict[str, Callable[[Options, torch.dtype, torch.Generator], State]] = {
    "flux-tiny": flux,
    "zimage": zimage,
    "sd15-small": checkpoint(SD15_SMALL),
    "sd15": checkpoint(SD15),
    "sdxl-small": checkpoint(SDXL | {"channel_mult": [1, 1, 1]}),
    "sdxl": checkpoint(SDXL),
    "taesd": taesd,
    "taef": taesd,
}


def build(kind: str, options: Options) -> State:
    """The state dict of one kind; options are those of tiny.KINDS, complete."""
    rng = torch.Generator().manual_seed(options["seed"])
    with torch.no_grad():
        return BUILDERS[kind](options, DTYPES[options["dtype"]], rng)
