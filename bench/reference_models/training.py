"""Training of one reference model: ComfyUI's own forward pass, noise schedule and preconditioning, one loss for all.

The model's ``model_sampling`` noises a latent with a sigma from its own table and turns the output into the
denoised latent; the loss is the squared error of the noise direction (x - denoised) / sigma. With epsilon
prediction that is the epsilon loss, with rectified flow the velocity loss. Epsilon errors may be weighted by 1 + sigma²
(SNR + 1 over SNR; Salimans & Ho 2022, arXiv 2202.00512): composition and colour are decided at the highest sigmas,
where they are a vanishing part of the noise to be predicted.
"""

from __future__ import annotations

import contextlib
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from reference_models.architectures import Reference, build
from reference_models.captions import embed, random_scene
from reference_models.pictures import draw, to_latents

DROPPED_CAPTIONS = 0.1
GUIDANCE = (1.0, 6.0)
PIXELS_PER_LATENT = 8  # as SDXL's size conditioning assumes


@dataclass(frozen=True)
class Settings:
    """Settings of a training run; part of the model card."""

    steps: int = 4000
    batch: int = 32
    latent_size: int = 16
    rate: float = 1e-3
    warmup: int = 200
    weight_decay: float = 0.01
    clip: float = 1.0
    ema: float = 0.999
    seed: int = 0


class TrainingLayers:
    """torch.nn's layers, which initialise their weights, under the names that ComfyUI's models use."""

    Linear = torch.nn.Linear
    Conv2d = torch.nn.Conv2d
    GroupNorm = torch.nn.GroupNorm
    LayerNorm = torch.nn.LayerNorm
    RMSNorm = torch.nn.RMSNorm
    Embedding = torch.nn.Embedding

    @staticmethod
    def conv_nd(_dims: int, *args: Any, **kwargs: Any) -> torch.nn.Conv2d:
        """Conv2d only, since training uses only pictures."""
        return torch.nn.Conv2d(*args, **kwargs)


class AddOutOfPlace(TorchFunctionMode):
    """Makes ``a += b`` out of place: Flux's blocks add in place to tensors that autograd still needs."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace that one function, and call any other."""
        if function is torch.Tensor.add_:  # called by `+=`
            return torch.add(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


class Trainer:
    """A model, its average, its optimizer and its random streams; all of it can be saved and resumed.

    Args:
        reference: which model.
        settings: for the whole run; a resumed run must have the same ones.
        device: where to train.
    """

    def __init__(self, reference: Reference, settings: Settings, device: torch.device) -> None:
        torch.manual_seed(settings.seed)
        self.reference, self.settings, self.device = reference, settings, device
        self.model = build(reference, TrainingLayers, device).to(device)
        self.weights = self.model.diffusion_model.train().requires_grad_(True)
        _initialise(self.weights, reference.zeros)
        reference.start(self.weights)
        self.average = {name: p.detach().clone() for name, p in self.weights.named_parameters()}
        self.optimizer = torch.optim.AdamW(
            self.weights.parameters(), settings.rate, (0.9, 0.99), weight_decay=settings.weight_decay
        )
        self.scenes = random.Random(settings.seed)  # noqa: S311 - pictures, not secrets
        self.noise = torch.Generator().manual_seed(settings.seed)
        self.step, self.seconds, self.losses = 0, 0.0, list[float]()

    def run(self, told: Callable[[int, float], None], save: Callable[[], None], every: int) -> None:
        """Train to the end; ``told`` gets (step, mean loss of the last 100); ``save`` is called now and then."""
        began = time.monotonic() - self.seconds
        with training_mode():
            while self.step < self.settings.steps:
                self._step()
                self.seconds = time.monotonic() - began
                recent = self.losses[-100:]
                told(self.step, sum(recent) / len(recent))
                if self.step % every == 0:
                    save()
        save()

    def _step(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate()
        loss, error = self._loss()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.weights.parameters(), self.settings.clip)
        self.optimizer.step()
        self.step += 1
        self.losses.append(error.item())
        decay = min(self.settings.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for name, parameter in self.weights.named_parameters():
                self.average[name].lerp_(parameter, 1 - decay)

    def _rate(self) -> float:
        """Learning rate: linear warm-up, then half a cosine to zero."""
        s = self.settings
        if self.step < s.warmup:
            return s.rate * (self.step + 1) / s.warmup
        return s.rate * (1 + math.cos(math.pi * (self.step - s.warmup) / max(s.steps - s.warmup, 1))) / 2

    def _loss(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(loss to minimize, mean squared error of the noise direction)."""
        size = self.settings.latent_size
        scenes = [random_scene(self.scenes) for _ in range(self.settings.batch)]
        latent = self.model.process_latent_in(to_latents(draw(scenes, 2 * size, self.scenes))).to(self.device)
        captions = [s.caption if self.scenes.random() > DROPPED_CAPTIONS else "" for s in scenes]
        noise = torch.randn(latent.shape, generator=self.noise).to(self.device)
        sigma = self._sigmas(len(scenes))
        column = sigma[:, None, None, None]
        noised = self.model.model_sampling.noise_scaling(column, noise, latent)
        with torch.autocast(self.device.type, torch.bfloat16), AddOutOfPlace():
            denoised = self.model.apply_model(noised, sigma, **self._conditions(captions, noise))
        squares = ((latent - denoised.float()) / column).square().mean((1, 2, 3))
        weights = 1 + sigma.square() if self.reference.weighted else torch.ones_like(sigma)
        return (weights * squares).mean(), squares.mean()

    def _sigmas(self, count: int) -> torch.Tensor:
        table = self.model.model_sampling.sigmas
        index = torch.randint(len(table), (count,), generator=self.noise)
        return table.to(self.device)[index.to(self.device)].float()

    def _conditions(self, captions: list[str], noise: torch.Tensor) -> dict[str, Any]:
        """The conditioning that the model's class makes from prompt, pooled vector and guidance, as in sampling."""
        tokens, pooled = (t.to(self.device) for t in embed(captions))
        pixels = self.settings.latent_size * PIXELS_PER_LATENT
        conditions = self.model.extra_conds(
            noise=noise,
            device=self.device,
            cross_attn=tokens,
            pooled_output=pooled,
            guidance=self.scenes.uniform(*GUIDANCE),
            width=pixels,
            height=pixels,
        )
        return {
            name: cond.process_cond(batch_size=len(captions), device=self.device).cond
            for name, cond in conditions.items()
        }

    # ----- files

    def state(self) -> dict[str, Any]:
        """Everything a resumed run needs, as plain containers and tensors."""
        return {
            "settings": asdict(self.settings),
            "step": self.step,
            "seconds": self.seconds,
            "losses": self.losses,
            "weights": self.weights.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "scenes": list(self.scenes.getstate()[1]),
            "noise": self.noise.get_state(),
        }

    def resume(self, path: Path) -> None:
        """Resume from a saved state. Raises ValueError if it was made with other settings."""
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["settings"] != asdict(self.settings):
            raise ValueError(f"{path}: was trained with {state['settings']}, not {asdict(self.settings)}; delete it")
        self.weights.load_state_dict(state["weights"])
        self.average = {name: tensor.to(self.device) for name, tensor in state["average"].items()}
        self.optimizer.load_state_dict(state["optimizer"])
        self.scenes.setstate((3, tuple(state["scenes"]), None))
        self.noise.set_state(state["noise"])
        self.step, self.seconds, self.losses = state["step"], state["seconds"], state["losses"]

    def trained(self) -> dict[str, torch.Tensor]:
        """The averaged weights in FP16, under the names used in published files."""
        return {self.reference.on_disk(name): tensor.half().cpu() for name, tensor in self.average.items()}


@contextlib.contextmanager
def training_mode() -> Iterator[None]:
    """Set ComfyUI's switch for kernels that have gradients."""
    import comfy.model_management

    comfy.model_management.in_training = True
    try:
        yield
    finally:
        comfy.model_management.in_training = False


def _initialise(model: torch.nn.Module, zeros: tuple[str, ...]) -> None:
    """Zero the layers that end a block, and initialise bare parameters (pad tokens), which ComfyUI leaves undefined."""
    for name, module in model.named_modules():
        if name.endswith(zeros):
            for parameter in module.parameters():
                torch.nn.init.zeros_(parameter)
        if not hasattr(module, "reset_parameters"):
            for parameter in module.parameters(recurse=False):
                torch.nn.init.normal_(parameter, std=0.02)
