"""Pictures of a reference model, with ComfyUI's own sampling, and its single calls, recorded and replayed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from reference_models.architectures import Reference
from reference_models.captions import embed
from reference_models.pictures import CHANNELS, to_pictures
from reference_models.prompts import Prompt

LATENT_SIZE, BATCH = 16, 16


def draw(model: Any, reference: Reference, prompts: list[Prompt], batch: int = BATCH) -> torch.Tensor:
    """Pictures [n, 3, 32, 32] in 0..1 of a ModelPatcher, with the family's sampler, steps and cfg."""
    with torch.inference_mode():
        parts = [_batch(model, reference, prompts[i : i + batch]) for i in range(0, len(prompts), batch)]
        return torch.cat(parts).clone()


def _batch(model: Any, reference: Reference, prompts: list[Prompt]) -> torch.Tensor:
    import comfy.sample

    noise = torch.stack([_noise(prompt.seed) for prompt in prompts])
    positive = _conditioning(reference, [prompt.caption for prompt in prompts])
    negative = _conditioning(reference, [""] * len(prompts))
    settings = (reference.steps, reference.cfg, reference.sampler, reference.scheduler)
    latents = comfy.sample.sample(
        model, noise, *settings, positive, negative, torch.zeros_like(noise), disable_pbar=True, seed=prompts[0].seed
    )
    return to_pictures(latents.float().cpu())


def _noise(seed: int) -> torch.Tensor:
    return torch.randn(CHANNELS, LATENT_SIZE, LATENT_SIZE, generator=torch.Generator().manual_seed(seed))


def _conditioning(reference: Reference, captions: list[str]) -> list[Any]:
    tokens, pooled = embed(captions)
    extra = {"pooled_output": pooled} if reference.pooled else {}
    if reference.guidance is not None:
        extra["guidance"] = reference.guidance
    return [[tokens, extra]]


@dataclass(frozen=True)
class Call:
    """One call of the diffusion model: the arguments of ``apply_model``, and the denoised latent it returned."""

    x: torch.Tensor
    sigma: torch.Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    denoised: torch.Tensor


def record(model: Any, reference: Reference, prompts: list[Prompt]) -> list[Call]:
    """Every call of one sampling run."""
    from comfy.patcher_extension import WrappersMP

    calls: list[Call] = []

    def apply(executor: Any, x: torch.Tensor, sigma: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        denoised = executor(x, sigma, *args, **kwargs)
        calls.append(Call(x.clone(), sigma.clone(), unwrapped(args), unwrapped(kwargs), denoised.clone()))
        return denoised

    clone = model.clone()
    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "record", apply)
    draw(clone, reference, prompts, len(prompts))
    return calls


def call_error(model: Any, calls: list[Call]) -> float:
    """Root mean square over calls of ||found - wanted|| / ||x - wanted||, the error relative to what a call removes."""
    import comfy.model_management

    squares = []
    with torch.inference_mode():
        comfy.model_management.load_models_gpu([model])
        for call in calls:
            found = model.model.apply_model(call.x, call.sigma, *call.args, **call.kwargs)
            squares.append(((found - call.denoised).square().sum() / (call.x - call.denoised).square().sum()).item())
    return float((sum(squares) / len(squares)) ** 0.5)


def unwrapped(values: Any) -> Any:
    """A call's arguments without the wrappers of the run that made it."""
    if isinstance(values, tuple):
        return tuple(_options(value) for value in values)
    return {key: _options(value) for key, value in values.items()}


def _options(value: Any) -> Any:
    kept = ("cond_or_uncond", "sigmas", "sample_sigmas")
    return {key: value[key] for key in kept if key in value} if isinstance(value, dict) else value
