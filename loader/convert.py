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
    Exclusions,
    Layer,
    Plan,
    Progress,
    format_named,
    plan_hswq,
    report,
    source_layers,
    write_plan,
)
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


class Job:
    """A connected MODEL, opened for conversion with its session: everything a method plans with.

    Attributes:
        info: identity of the model.
        session: its statistics.
        source: its tensors, LoRAs merged.
        layers: every Linear and Conv2d, in the source's order.
        read: the weight of a layer, on the device that searches.

    Raises:
        HSWQError: missing or foreign statistics, a quantized model, only one of clip and vae.
    """

    def __init__(self, model: Any, clip: Any, vae: Any, session: str) -> None:
        path = path_of(session)
        self.info = inspect_model(model)
        self.session = open_session(path, self.info)
        self.session.require_statistics(f"Session {session}")
        self.source = ModelSource(model, self.info, clip, vae)
        self.layers = source_layers(self.source, self.source.prefix, self.info.kinds)
        self.read = _reader(self.source, self.layers)

    def target(self, budget: str, file_format: str, prefix: str) -> Path:
        """A file name of its own in the folder stock loaders look in. Raises FileError if it is not writable."""
        name = f"{self.source.name}_{describe(self.session.calls, budget, file_format)}"
        target = output_path(output_folder(whole=self.source.whole), prefix, name)
        require_writable(target.parent)
        return target

    def write(self, target: Path, plan: Plan, progress: Progress) -> tuple[Conversion, str]:
        """Write and check the file of a plan; returns it and a report."""
        done = write_plan(
            target,
            self.source,
            self.source.prefix,
            plan,
            self.session,
            progress=progress,
            check=lambda temporary: verify_file(temporary, plan, format_named(plan.file_format)),
        )
        log.info("HSWQ: %s: %s", done.path.name, plan.accounting())
        return done, report(done, self.session)


def convert_model(model: Any, clip: Any, vae: Any, request: Request, progress: Progress) -> tuple[Conversion, str]:
    """Convert and write where stock loaders look; returns the file and a report.

    Raises:
        HSWQError: wrong setting, missing or foreign statistics, unwritable folder, a file that would not open.
    """
    file_format = format_named(request.file_format)
    check_keep_ratio(request.keep_ratio)
    job = Job(model, clip, vae, request.session)
    target = job.target(f"{request.keep_ratio:g}", file_format.name, request.filename_prefix)
    plan = plan_hswq(
        job.layers,
        job.session,
        job.read,
        exclusions=Exclusions(job.info.family),
        file_format=file_format,
        keep_ratio=request.keep_ratio,
        progress=progress,
    )
    return job.write(target, plan, progress)


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


def output_folder(*, whole: bool) -> Path:
    """``output/checkpoints`` or ``output/diffusion_models``: ComfyUI's loaders list both."""
    return Path(folder_paths.get_output_directory()) / ("checkpoints" if whole else "diffusion_models")
