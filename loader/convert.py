"""One conversion from a connected MODEL: statistics, source, plan, file, check."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management
import folder_paths
import torch

from ..hswq_core import (
    Conversion,
    Layer,
    Plan,
    Progress,
    Session,
    family_named,
    format_named,
    plan_hswq,
    report,
    source_layers,
)
from ..hswq_core import write_plan as write
from ..hswq_core.atomic import require_writable
from ..hswq_core.hswq import check_keep_ratio
from ..hswq_core.names import describe, output_path
from .model import inspect_model
from .source import ModelSource
from .store import open_session, path_of
from .verify import verify_file

log = logging.getLogger(__name__)

# float32 weight, its absolute values, bin numbers, importance (8 bytes), codes, error: counted in the code.
SEARCH_BYTES_PER_WEIGHT = 32


@dataclass(frozen=True)
class Request:
    """What the user asked for; see the Converter node's inputs."""

    session: str
    file_format: str
    keep_ratio: float
    filename_prefix: str


def convert_model(model: Any, clip: Any, vae: Any, request: Request, progress: Progress) -> tuple[Conversion, str]:
    """Convert and write where stock loaders look; returns the file and a report.

    Raises:
        HSWQError: wrong setting, missing or foreign statistics, unwritable folder, a file that would not open.
    """
    file_format = format_named(request.file_format)
    check_keep_ratio(request.keep_ratio)
    path = path_of(request.session)
    info = inspect_model(model)
    session = open_session(path, info)
    session.require_statistics(f"Session {request.session}")
    source = ModelSource(model, info, clip, vae)
    folder = output_folder(whole=source.whole)
    budget = f"{request.keep_ratio:g}"
    target = output_path(
        folder, request.filename_prefix, f"{source.name}_{describe(session.calls, budget, file_format.name)}"
    )
    require_writable(target.parent)
    layers = source_layers(source, source.prefix, info.kinds)
    plan = plan_hswq(
        layers,
        session,
        _reader(source, layers),
        family=family_named(session.family),
        file_format=file_format,
        keep_ratio=request.keep_ratio,
        progress=progress,
    )
    return _write(target, source, plan, session, progress)


def _reader(source: ModelSource, layers: list[Layer]) -> Callable[[Layer], torch.Tensor]:
    """Weights on the GPU, if there is one, with room made for the search on the largest layer.

    Apple's MPS has no float64, which the search sums in: there the CPU searches.
    """
    device = comfy.model_management.get_torch_device()
    if device.type == "mps":
        device = torch.device("cpu")
    if device.type != "cpu":
        largest = max((math.prod(layer.shape) for layer in layers), default=0)
        comfy.model_management.free_memory(largest * SEARCH_BYTES_PER_WEIGHT, device)
    return lambda layer: source.read(f"{source.prefix}{layer.name}.weight").to(device)


def _write(
    target: Path, source: ModelSource, plan: Plan, session: Session, progress: Progress
) -> tuple[Conversion, str]:
    file_format = format_named(plan.file_format)
    done = write(
        target,
        source,
        source.prefix,
        plan,
        session,
        progress=progress,
        check=lambda temporary: verify_file(temporary, plan, file_format),
    )
    log.info("HSWQ: %s: %s", done.path.name, plan.accounting())
    return done, report(done, session)


def output_folder(*, whole: bool) -> Path:
    """``output/checkpoints`` or ``output/diffusion_models``: ComfyUI's loaders list both."""
    return Path(folder_paths.get_output_directory()) / ("checkpoints" if whole else "diffusion_models")
