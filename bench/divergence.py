"""Which calls make a picture diverge? Pictures drawn in FP16, with the FP8 model in only a few of the steps.

    nox -s bench -- divergence.py --models sdxl

For every picture: PSNR against FP16 with the `model_aware` file in all steps, in the first, in the next, and so on.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from judge.options import begun, parser
from judge.scores import each, psnr
from judge.subject import Subject, open_hswq, open_stock
from reference_models.architectures import REFERENCES, Reference
from reference_models.prompts import evaluation_prompts
from reference_models.sampling import draw, unwrapped

RANGES = ((0, 20), (0, 1), (1, 2), (2, 4), (4, 8), (8, 12), (12, 16), (16, 20))
WORST = 4


def main() -> None:
    """Print one table per model."""
    asked = parser(__doc__)
    asked.add_argument("--prompts", type=int, default=48)
    asked.add_argument("--extra", type=float, default=3.0, help="percent")
    options = begun(asked)
    for name in options.models:
        print(f"\n{REFERENCES[name].layout}, v2, +{options.extra:g} %\n")
        print(table(measured(REFERENCES[name], options)))


def measured(reference: Reference, options: Any) -> dict[tuple[int, int], list[float]]:
    """{steps: PSNR of every picture}."""
    file = Subject(reference, 32).converted("v2", "model_aware", extra_percent=options.extra)
    exact, rounded, prompts = open_stock(reference.file), open_hswq(file), evaluation_prompts(options.prompts)
    truth = draw(exact, reference, prompts)
    found = {}
    for steps in RANGES:
        pictures = draw(mixed(exact, rounded, steps), reference, prompts)
        found[steps] = each(psnr, pictures, truth)
    return found


def mixed(exact: Any, rounded: Any, steps: tuple[int, int]) -> Any:
    """``exact``, but with the calls of these steps computed by ``rounded``."""
    import comfy.model_management
    from comfy.patcher_extension import WrappersMP

    def apply(executor: Any, x: torch.Tensor, sigma: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        options = next(value for value in (*args, *kwargs.values()) if isinstance(value, dict))
        schedule = options["sample_sigmas"]
        step = int((schedule - sigma[0].to(schedule.device)).abs().argmin())
        if not steps[0] <= step < steps[1]:
            return executor(x, sigma, *args, **kwargs)
        return rounded.model.apply_model(x, sigma, *unwrapped(args), **unwrapped(kwargs))

    comfy.model_management.load_models_gpu([rounded])
    clone = exact.clone()
    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "mixed", apply)
    return clone


def table(found: dict[tuple[int, int], list[float]]) -> str:
    """One line per range of steps; the worst pictures are the worst with FP8 in all steps."""
    worst = np.argsort(found[RANGES[0]])[:WORST]
    heads = " | ".join(f"picture {i}" for i in worst)
    lines = [f"| FP8 in steps | mean | median | 5th pct | {heads} |", "|---|" + "--:|" * (3 + WORST)]
    for (first, end), values in found.items():
        numbers = (np.mean(values), np.median(values), np.percentile(values, 5), *(values[i] for i in worst))
        lines.append(f"| {first} to {end - 1} | {' | '.join(f'{number:.1f}' for number in numbers)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
