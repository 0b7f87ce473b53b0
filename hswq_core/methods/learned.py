"""Method ``learned``: rounding fitted to each weight without calibration, for models without statistics.

A layer's weight W [out, k] hints at its inputs: training takes steps along the inputs, so they lie along W's largest
singular directions. The inputs are modelled by their second moments

    G = A Aᵀ + RIDGE · I,  A = V diag(s) √((1 - RIDGE) k / Σ s²),

with s, V the largest singular values of W and their right singular vectors [k, samples]; tr G = k. The error that
AdaRound (Nagel et al. 2020, arXiv 2004.10568) minimizes for a layer is then the quantized loss

    L(Ŵ) = tr((Ŵ - W) G (Ŵ - W)ᵀ) / tr(W G Wᵀ),

where the ridge penalizes every direction. It is minimized directly over the codes (``descent``), since the final cast
would undo the result of a continuous relaxation.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import partial

import torch

from ..errors import SettingError
from ..model.layer import Layer
from ..plan.plan import SKIP, LayerPlan, Plan
from ..progress import announced
from ..quant.cholesky import Tick
from ..quant.descent import Descent, LowRank
from ..quant.gptq import never_cancelled
from ..quant.grid import largest
from ..quant.metrics import sqnr_db
from ..quant.schemes.scheme import Scheme
from .decide import not_quantized, require_finite, require_unquantized, round_to_nearest
from .method import Method, NoBudget, Planned, Task
from .solve import NEAREST, Solution

LEARNED_CODES = "learned"

# Isotropic share of the moments. `nox -s bench -- learned.py` measures its effect.
RIDGE = 0.7
# Extra directions beyond those used, as recommended for randomized decompositions (Halko et al. 2011,
# arXiv 0909.4061, section 1.3).
OVERSAMPLING = 8
# Rows processed at a time on the CPU: they are independent, and this bounds the memory for their errors.
ROWS = 1024


@dataclass(frozen=True)
class LearnedOptions(NoBudget):
    """Settings of method ``learned``.

    Attributes:
        iterations: maximum number of sweeps over a weight's columns; stops early once a sweep gains nothing.
        samples: maximum number of singular directions that model a layer's inputs.
        seed: seed of the randomized singular value decomposition.

    Raises:
        SettingError: a number out of range.
    """

    iterations: int = 8
    samples: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"iterations": 0, "samples": 1, "seed": 0}
        for field in fields(self):
            value = getattr(self, field.name)
            if value < least[field.name]:
                raise SettingError(
                    field.name, got=value, expected=f"{least[field.name]} or more", remedy=f"{field.default} is usual."
                )


def input_moments(w: torch.Tensor, options: LearnedOptions) -> LowRank:
    """Modelled G of the inputs of ``w`` [out, k], float32. Deterministic for a given seed on one machine."""
    rank = min(options.samples + OVERSAMPLING, *w.shape)
    with torch.random.fork_rng([w.device] if w.device.type == "cuda" else []):
        torch.manual_seed(options.seed)
        _, s, v = torch.svd_lowrank(w, rank)
    s, v = s[: options.samples], v[:, : options.samples]
    norm = s.norm().clamp(min=torch.finfo(torch.float32).tiny)
    return LowRank(v * (s / norm * ((1 - RIDGE) * w.shape[1]) ** 0.5), RIDGE)


def learn(
    w: torch.Tensor,
    scheme: Scheme,
    options: LearnedOptions,
    *,
    amax: float | None = None,
    tick: Tick = never_cancelled,
) -> Solution:
    """Round one weight; no row ends up with a larger quantized loss than with round to nearest.

    L includes RIDGE · |Ŵ - W|², so the weight's own squared error is at most 1 / RIDGE times the loss of round to
    nearest. The largest weights keep their nearest code, from which ComfyUI measures the scale when it requantizes
    (see ``solve``).

    Args:
        w: finite [out, ...], flattened to [out, k].
        scheme: per-tensor, or without a scale.
        amax: clip limit, see ``Scheme.steps``.
        tick: called about once per second of work; may raise to cancel.

    Returns:
        The codes, with L of them and of round to nearest as errors; both 0 for a zero weight.
    """
    steps = scheme.steps(w, amax)
    rows = scheme.into(w, steps).flatten(1)
    top, moments = largest(rows), input_moments(rows, options)
    descent, codes, losses = Descent(moments), [], rows.new_zeros(3, dtype=torch.float64)
    for part in rows.split(ROWS if w.device.type == "cpu" else len(w)):
        nearest = scheme.nearest(part)
        rounded = descent.rounded(part, scheme.nearest, sweeps=options.iterations, tick=tick)
        rounded = torch.where(part.abs() == top, nearest, rounded)
        loss, nearest_loss = moments.losses(rounded - part), moments.losses(nearest - part)
        codes.append(scheme.cast(torch.where((loss < nearest_loss)[:, None], rounded, nearest)))
        losses += torch.stack((torch.minimum(loss, nearest_loss), nearest_loss, moments.losses(part))).sum(1)
    learned, nearest_loss, signal = losses.tolist()
    how = LEARNED_CODES if learned < nearest_loss else NEAREST
    signal = signal or 1.0
    tensors = scheme.tensors(torch.cat(codes).reshape(w.shape), steps)
    return Solution(scheme.name, tensors, how, None, learned / signal, nearest_loss / signal)


def learnable(layer: Layer, samples: int) -> bool:
    """Whether the input model can be trusted: not with few outputs, nor for 1 × 1 convolutions.

    A weight with fewer rows than samples has no directions beyond its own rows; using them, the last layer of the
    SDXL-layout reference model (16 rows) has 9.7 times the error on its real inputs. Among that model's 7 1 × 1
    convolutions, which are skip connections, 6 got worse (bench/RESULTS.md).
    """
    return layer.shape[0] >= samples and layer.shape[2:] != (1, 1)


def plan_learned(task: Task, options: LearnedOptions) -> Planned:
    """The plan of ``plan_nearest``, with learned codes wherever they reduce a layer's quantized loss.

    Raises:
        LayerError: a layer already in FP8, or with NaN or infinity.
    """
    excluded = task.exclusions.reasons(task.layers, {})
    file_format = task.encoding.file_format

    def decide(layer: Layer, tick: Tick) -> LayerPlan:
        require_unquantized(layer)
        if layer.name in excluded:
            return not_quantized(layer, SKIP, excluded[layer.name])
        w = task.read(layer)
        require_finite(layer, w)
        plan = round_to_nearest(layer, w, largest(w), NEAREST, file_format)
        if plan.stored is None or not learnable(layer, options.samples):
            return plan
        solution = learn(w, plan.stored, options, amax=plan.amax, tick=tick)
        plan = plan.measured(loss=solution.error, nearest_loss=solution.nearest_error)
        if solution.how == NEAREST:
            return plan
        task.solutions.add(layer.name, solution)
        return replace(plan, reason=LEARNED_CODES).measured(sqnr_db=sqnr_db(w, solution.restored(w.device)))

    steps = announced(task.layers, "Learning")
    layers = tuple(decide(layer, partial(task.progress, *step)) for layer, step in steps)
    plan = Plan(file_format.name, LEARNED.name, "", task.exclusions.family.name, layers)
    plan.require_closed(len(task.layers))
    return Planned(plan, task.solutions)


LEARNED = Method("learned", plan_learned, settings=LearnedOptions, own_codes=True)
