"""The methods to compare: each row makes a file from a subject, and says which loader opens it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from judge.peers import convert_to_quant, int8_convrot
from judge.sizes import sizes
from judge.subject import Subject, open_fast, open_hswq, open_stock


@dataclass(frozen=True)
class Method:
    """One row of the tables.

    Attributes:
        name: name in the recorded results.
        label: label in tables.
        make: Subject -> file.
        open: file -> MODEL.
        slow: takes minutes on a CPU; left out of quick runs.
    """

    name: str
    label: str
    make: Callable[[Subject], Path]
    open: Callable[[Path], Any]
    slow: bool = False


def as_published(job: Any, method: Any, file_format: str) -> Any:
    """What a method plans with if no layer is excluded by name or size, as other tools have it."""
    from hswq.hswq_core.methods.exclusions import Exclusions
    from hswq.hswq_core.plan.encoding import Encoding
    from hswq.hswq_core.plan.formats import format_named
    from hswq.loader.convert.model import task_for

    task = task_for(job, method, Encoding(format_named(file_format)))
    return replace(task, exclusions=Exclusions.as_published(job.info.family))


def nearest(subject: Subject, file_format: str) -> Path:
    """Every layer rounded to nearest, as in a stock FP8 file."""
    from hswq.hswq_core.methods.nearest import NEAREST, plan_nearest

    return subject.planned(lambda job: plan_nearest(as_published(job, NEAREST, file_format)))


def learned(subject: Subject, file_format: str) -> Path:
    """Every layer rounded from its own weight alone, as the command line's method learned does."""
    from hswq.hswq_core.methods.learned import LEARNED, LearnedOptions, plan_learned

    return subject.planned(lambda job: plan_learned(as_published(job, LEARNED, file_format), LearnedOptions()))


def published(subject: Subject, file_format: str, keep_ratio: float) -> Path:
    """HSWQ as its author runs it: every layer ranked, none excluded."""
    from hswq.hswq_core.methods.hswq import HSWQ, HSWQSettings, plan_hswq

    return subject.planned(lambda job: plan_hswq(as_published(job, HSWQ, file_format), HSWQSettings(keep_ratio)))


def at_the_bytes_of(subject: Subject, file_format: str, keep_ratio: float) -> Path:
    """HSWQ Converter with method model_aware and a file as large as that of ``published``."""
    size = sizes(published(subject, "v2", keep_ratio), subject.reference.file)["extra"]
    return subject.converted(file_format, "model_aware", extra_percent=math.floor(1000 * size) / 10)


def _ours(file_format: str) -> Callable[[Path], Any]:
    return open_stock if file_format == "comfy" else open_hswq


FORMATS = ("v1", "v2", "comfy")
METHODS = (
    Method("cast", "plain cast", partial(nearest, file_format="v1"), open_hswq),
    Method("nearest v2", "scaled nearest, v2", partial(nearest, file_format="v2"), open_hswq),
    Method("nearest comfy", "scaled nearest, comfy", partial(nearest, file_format="comfy"), open_stock),
    Method("learned v2", "learned, v2", partial(learned, file_format="v2"), open_hswq),
    Method("learned comfy", "learned, comfy", partial(learned, file_format="comfy"), open_stock),
    *(
        Method(
            f"published {keep} {form}",
            f"HSWQ as published, keep {keep:.2f}, {form}",
            partial(published, file_format=form, keep_ratio=keep),
            open_hswq,
        )
        for keep in (0.10, 0.25)
        for form in ("v1", "v2")  # its author's formats
    ),
    *(
        Method(
            f"hswq 0.25 {form}",
            f"Converter, hswq, keep 0.25, {form}",
            partial(Subject.converted, file_format=form, method="hswq", keep_ratio=0.25),
            _ours(form),
        )
        for form in FORMATS
    ),
    *(
        Method(
            f"model_aware {extra} {form}",
            f"Converter, model_aware, +{extra} %, {form}",
            partial(Subject.converted, file_format=form, method="model_aware", extra_percent=extra),
            _ours(form),
        )
        for extra in (1, 3, 6, 17)
        for form in FORMATS
    ),
    *(
        Method(
            f"model_aware at 0.1 {form}",
            f"Converter, model_aware, bytes of keep 0.10, {form}",
            partial(at_the_bytes_of, file_format=form, keep_ratio=0.10),
            _ours(form),
        )
        for form in FORMATS
    ),
    Method(
        "model_aware 3 v2 channel",
        "Converter, model_aware, scale_per channel, +3 %, v2",
        partial(Subject.converted, file_format="v2", method="model_aware", extra_percent=3, scale_per="channel"),
        open_hswq,
    ),
    *(
        Method(
            f"model_aware 3 comfy fast {loss}",
            f"Converter, model_aware, fast_matmul, {loss} dB, +3 %, comfy",
            partial(Subject.converted, file_format="comfy", method="model_aware", extra_percent=3, fast_matmul=loss),
            open_fast,
        )
        for loss in (3, 6, 100)
    ),
    Method("convert-to-quant", "convert-to-quant 1.3.4, defaults", convert_to_quant, open_stock, slow=True),
    Method("int8 convrot", "INT8 ConvRot W8A8, Linears", int8_convrot, open_stock),
)
