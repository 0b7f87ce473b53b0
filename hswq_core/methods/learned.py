"""Method ``learned``: rounding fitted to each weight without calibration, for models of which there are no statistics.

Which inputs a layer gets, its weight W [out, k] tells in part: training is made of steps along the inputs, so they lie
where W's largest singular values are. The model of the inputs is their second moments

    G = A Aᵀ + RIDGE · I,  A = V diag(s) √((1 - RIDGE) k / Σ s²),

with s, V the largest singular values of W and their right vectors [k, samples]; tr G = k. The error that AdaRound
(Nagel et al. 2020, arXiv 2004.10568) minimizes for a layer is then the quantized loss

    L(Ŵ) = tr((Ŵ - W) G (Ŵ - W)ᵀ) / tr(W G Wᵀ),

in which the ridge lets no direction go free. It is minimized over the codes themselves (``descent``): a continuous loss
would have to be undone by the last cast.
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
from .method import Method, Planned, Task
from .solve import NEAREST, Solution

LEARNED_CODES = "learned"

# Share of the moments that is alike in all directions. `nox -s bench -- learned.py` measures what it is worth.
RIDGE = 0.7
# More directions than are used, as the authors of the randomized decomposition advise (Halko et al. 2011,
# arXiv 0909.4061, section 1.3).
OVERSAMPLING = 8
# Rows worked on at a time on the CPU: they do not know of each other, and memory holds their errors only.
ROWS = 1024


@dataclass(frozen=True)
class LearnedOptions:
    """How long and by what to learn.

    Attributes:
        iterations: sweeps over a weight's columns, at most: the last is one that gains nothing.
        samples: singular directions that stand for a layer's inputs, at most.
        seed: of the randomized singular value decomposition.

    Raises:
        SettingError: a number out of its range.
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

    @property
    def text(self) -> str:
        """No budget."""
        return ""

    def extra_bytes(self, smallest: int, layers: int) -> int:  # noqa: ARG002 - the protocol's
        """None."""
        return 0


def input_moments(w: torch.Tensor, options: LearnedOptions) -> LowRank:
    """G of the inputs that ``w`` [out, k], float32, suggests. The same seed gives the same, on one machine."""
    wide = min(options.samples + OVERSAMPLING, *w.shape)
    with torch.random.fork_rng([w.device] if w.device.type == "cuda" else []):
        torch.manual_seed(options.seed)
        _, s, v = torch.svd_lowrank(w, wide)
    s, v = s[: options.samples], v[:, : options.samples]
    length = s.norm().clamp(min=torch.finfo(torch.float32).tiny)
    return LowRank(v * (s / length * ((1 - RIDGE) * w.shape[1]) ** 0.5), RIDGE)


def learn(
    w: torch.Tensor,
    scheme: Scheme,
    options: LearnedOptions,
    *,
    amax: float | None = None,
    tick: Tick = never_cancelled,
) -> Solution:
    """Round one weight; no row of it has a larger quantized loss than with nearest rounding.

    L counts RIDGE · |Ŵ - W|²: so the weight's own squared error is at most 1 / RIDGE of nearest rounding's loss. The
    largest weights keep their nearest code, by which ComfyUI measures a scale where it requantizes (see ``solve``).

    Args:
        w: finite [out, ...], flattened to [out, k].
        scheme: with one scale a tensor, or none.
        amax: clip limit, see ``Scheme.steps``.
        tick: called every second or so of work; may raise to cancel.

    Returns:
        Codes, with L of them and of nearest rounding's as errors; both 0 for a zero weight.
    """
    steps = scheme.steps(w, amax)
    rows = scheme.into(w, steps).flatten(1)
    most, moments = largest(rows), input_moments(rows, options)
    descent, codes, losses = Descent(moments), [], rows.new_zeros(3, dtype=torch.float64)
    for part in rows.split(ROWS if w.device.type == "cpu" else len(w)):
        nearest = scheme.nearest(part)
        rounded = descent.rounded(part, scheme.nearest, sweeps=options.iterations, tick=tick)
        rounded = torch.where(part.abs() == most, nearest, rounded)
        loss, plain = moments.losses(rounded - part), moments.losses(nearest - part)
        codes.append(scheme.cast(torch.where((loss < plain)[:, None], rounded, nearest)))
        losses += torch.stack((torch.minimum(loss, plain), plain, moments.losses(part))).sum(1)
    learned, plain, signal = losses.tolist()
    how = LEARNED_CODES if learned < plain else NEAREST
    signal = signal or 1.0
    tensors = scheme.tensors(torch.cat(codes).reshape(w.shape), steps)
    return Solution(scheme.name, tensors, how, None, learned / signal, plain / signal)


def learnable(layer: Layer, samples: int) -> bool:
    """Whether the model of the inputs is believed: not for few outputs, nor for 1 × 1 convolutions.

    A weight of fewer rows than samples has no directions beside its own rows: with them the last layer of the
    SDXL-layout reference model, 16 rows, errs 9.7 times as much on its real inputs. Of its 7 convolutions of 1 × 1,
    which are skip connections, 6 erred more (bench/RESULTS.md).
    """
    return layer.shape[0] >= samples and layer.shape[2:] != (1, 1)


def plan_learned(task: Task, options: LearnedOptions) -> Planned:
    """The plan of ``plan_nearest``, with the codes learned where that lessens a layer's quantized loss.

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
        found = learn(w, plan.stored, options, amax=plan.amax, tick=tick)
        plan = plan.measured(loss=found.error, nearest_loss=found.nearest_error)
        if found.how == NEAREST:
            return plan
        task.solutions.add(layer.name, found)
        return replace(plan, reason=LEARNED_CODES).measured(sqnr_db=sqnr_db(w, found.restored(w.device)))

    steps = announced(task.layers, "Learning")
    layers = tuple(decide(layer, partial(task.progress, *said)) for layer, said in steps)
    plan = Plan(file_format.name, LEARNED.name, "", task.exclusions.family.name, layers)
    plan.require_closed(len(task.layers))
    return Planned(plan, task.solutions)


LEARNED = Method("learned", plan_learned, settings=LearnedOptions, own_codes=True)
