"""How much of a file's quality survives a LoRA? Pictures against those of the FP16 model with the same LoRA.

    nox -s bench -- lora.py --models sdxl flux --threads 2

The LoRA is random: rank 8 on every matrix of at least 64 x 64, a change of `--strength` of each weight's own size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from judge.options import begun, parser
from judge.scores import each, psnr
from judge.subject import Subject, open_hswq, open_stock
from reference_models.architectures import REFERENCES, Reference
from reference_models.prompts import evaluation_prompts
from reference_models.sampling import draw
from rig.tiny import LORA_MIN_WIDTH

RANK = 8
ROWS = (
    ("model_aware, +3 %, v2", "v2", "model_aware", "HSWQ Loader, exact"),
    ("model_aware, +3 %, v2", "v2", "model_aware", "HSWQ Loader, stock"),
    ("model_aware, +3 %, comfy", "comfy", "model_aware", "ComfyUI's loader"),
    ("hswq, keep 0.25, v2", "v2", "hswq", "HSWQ Loader, exact"),
    ("hswq, keep 0.25, v2", "v2", "hswq", "HSWQ Loader, stock"),
)


def main() -> None:
    """Print one table per model."""
    asked = parser(__doc__)
    asked.add_argument("--prompts", type=int, default=48)
    asked.add_argument("--strength", type=float, default=0.1)
    options = begun(asked)
    for name in options.models:
        print(f"\n{REFERENCES[name].layout}, LoRA of {options.strength:.0%}\n")
        print(table(REFERENCES[name], options), flush=True)


def table(reference: Reference, options: Any) -> str:
    """PSNR with and without the LoRA, one line per row."""
    subject, prompts = Subject(reference, 32), evaluation_prompts(options.prompts)
    lora = random_lora(subject.model, options.strength)
    plain = draw(subject.model, reference, prompts)
    truth = draw(patched(subject.model, lora), reference, prompts)
    lines = [
        f"The LoRA itself changes the pictures to {scores(plain, truth)} dB.\n",
        "| file | opened by | PSNR without LoRA (5 %) | with LoRA (5 %) |\n|---|---|--:|--:|",
    ]
    files: dict[tuple[str, str], Path] = {}
    for name, file_format, method, loader in ROWS:
        file = files.get((file_format, method)) or subject.converted(file_format, method)
        files[file_format, method] = file
        model = open_hswq(file, lora=loader.split()[-1]) if "HSWQ" in loader else open_stock(file)
        alone = scores(draw(model, reference, prompts), plain)
        with_lora = scores(draw(patched(model, lora), reference, prompts), truth)
        lines.append(f"| {name} | {loader} | {alone} | {with_lora} |")
    return "\n".join(lines)


def random_lora(model: Any, strength: float) -> dict[str, torch.Tensor]:
    """A LoRA with keys ComfyUI's LoRA loader knows; std of up @ down = ``strength`` · std of the weight."""
    from hswq.loader.model import layer_modules

    rng, state = torch.Generator().manual_seed(0), {}
    for name, module in layer_modules(model.model.diffusion_model).items():
        weight = module.weight.float()
        if weight.dim() == 2 and min(weight.shape) >= LORA_MIN_WIDTH:
            up = torch.randn(weight.shape[0], RANK, generator=rng)
            down = torch.randn(RANK, weight.shape[1], generator=rng) * strength * weight.std() / RANK**0.5
            state |= {f"diffusion_model.{name}.lora_{side}.weight": part for side, part in (("up", up), ("down", down))}
    return state


def patched(model: Any, lora: dict[str, torch.Tensor]) -> Any:
    """The MODEL after a LoRA loader with strength 1."""
    import comfy.sd

    with torch.inference_mode():
        return comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)[0]


def scores(pictures: torch.Tensor, truth: torch.Tensor) -> str:
    """Mean and 5th percentile of the PSNR."""
    found = each(psnr, pictures, truth)
    return f"{np.mean(found):.1f} ({np.percentile(found, 5):.1f})"


if __name__ == "__main__":
    main()
