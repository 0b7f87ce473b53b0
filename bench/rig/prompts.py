"""API-format prompts for the rig's small models, built without a page."""

from __future__ import annotations

from typing import Any

from rig.client import Prompt


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    """One entry of a prompt; a link is [node id, output index]."""
    return {"class_type": class_type, "inputs": inputs}


def sampler(**changes: Any) -> dict[str, Any]:
    """A KSampler on the nodes `model`, `positive`, `negative`, `latent`: 2 Euler steps."""
    settings: dict[str, Any] = {
        "model": ["model", 0],
        "positive": ["positive", 0],
        "negative": ["negative", 0],
        "latent_image": ["latent", 0],
        "seed": 0,
        "steps": 2,
        "cfg": 3.0,
        "sampler_name": "euler",
        "scheduler": "normal",
        "denoise": 1.0,
    }
    return node("KSampler", **(settings | changes))


def sd15(checkpoint: str, *, size: int = 64, text: str = "a cat", **changes: Any) -> Prompt:
    """Checkpoint with text encoder and VAE -> picture. `changes` go to the KSampler."""
    return {
        "model": node("CheckpointLoaderSimple", ckpt_name=checkpoint),
        "positive": node("CLIPTextEncode", clip=["model", 1], text=text),
        "negative": node("CLIPTextEncode", clip=["model", 1], text=""),
        "latent": node("EmptyLatentImage", width=size, height=size, batch_size=1),
        "sampler": sampler(**changes),
        "decode": node("VAEDecode", samples=["sampler", 0], vae=["model", 2]),
        "save": node("SaveImage", images=["decode", 0], filename_prefix="sd15"),
    }


def sdxl(checkpoint: str, vae: str, *, size: int = 64, **changes: Any) -> Prompt:
    """A UNet-only checkpoint with random conditioning -> picture (`vae`: a taesd file)."""
    return {
        "model": node("CheckpointLoaderSimple", ckpt_name=checkpoint),
        **_conditioning(width=2048, pooled_width=1280, tokens=77),
        "latent": node("EmptyLatentImage", width=size, height=size, batch_size=1),
        "sampler": sampler(**changes),
        **_picture(vae, "sdxl"),
    }


def flux(model: str, vae: str, *, size: int = 64, **changes: Any) -> Prompt:
    """A Flux transformer with random conditioning, guidance 3.5 -> picture (`vae`: taef)."""
    settings = {"cfg": 1.0, "scheduler": "simple", "positive": ["guidance", 0]}
    return {
        "model": node("UNETLoader", unet_name=model, weight_dtype="default"),
        **_conditioning(width=768, pooled_width=768, tokens=12),
        "guidance": node("FluxGuidance", conditioning=["positive", 0], guidance=3.5),
        "latent": node("EmptySD3LatentImage", width=size, height=size, batch_size=1),
        "sampler": sampler(**(settings | changes)),
        **_picture(vae, "flux"),
    }


def zimage(model: str, vae: str, *, size: int = 64, **changes: Any) -> Prompt:
    """A Z-Image transformer with random conditioning -> picture (`vae`: taef)."""
    return {
        "model": node("UNETLoader", unet_name=model, weight_dtype="default"),
        **_conditioning(width=2560, pooled_width=0, tokens=8),
        "latent": node("EmptySD3LatentImage", width=size, height=size, batch_size=1),
        "sampler": sampler(**({"cfg": 1.0, "scheduler": "simple"} | changes)),
        **_picture(vae, "zimage"),
    }


def insert(prompt: Prompt, key: str, new: dict[str, Any], after: str = "model") -> Prompt:
    """A copy with `new` as node `key` inserted between output 0 of `after` and the nodes that used it."""
    link, changed = [after, 0], {}
    for name, old in prompt.items():
        inputs = {k: [key, 0] if v == link else v for k, v in old["inputs"].items()}
        changed[name] = {**old, "inputs": inputs}
    return {**changed, key: new}


def _conditioning(**widths: int) -> Prompt:
    return {
        "positive": node("RigConditioning", seed=1, **widths),
        "negative": node("RigConditioning", seed=2, **widths),
    }


def _picture(vae: str, prefix: str) -> Prompt:
    return {
        "vae": node("VAELoader", vae_name=vae),
        "decode": node("VAEDecode", samples=["sampler", 0], vae=["vae", 0]),
        "save": node("SaveImage", images=["decode", 0], filename_prefix=prefix),
    }
