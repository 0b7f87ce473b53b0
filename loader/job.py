"""A connected MODEL, opened for conversion: its session, its tensors, and the file it becomes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import folder_paths
import torch

from ..hswq_core.calibration.states import MAX_STATES, State
from ..hswq_core.calibration.states_file import load_states, states_path
from ..hswq_core.convert.output import Conversion, report, source_layers, write_plan
from ..hswq_core.files.atomic import require_writable
from ..hswq_core.files.names import describe, output_path
from ..hswq_core.methods.solve import Solution
from ..hswq_core.model.layer import Layer, bias_key, weight_key
from ..hswq_core.plan.budget import BYTES_BESIDE_A_LAYER, smallest_size
from ..hswq_core.plan.encoding import Encoding
from ..hswq_core.plan.formats import TENSOR, format_named
from ..hswq_core.plan.plan import Plan
from ..hswq_core.progress import Progress
from .calibration.model import require_recorded
from .devices import make_room, search_device
from .model import inspect_model
from .open.verify import verify_file
from .sessions.store import open_session, path_of
from .source import ModelSource

log = logging.getLogger(__name__)

WORK_SUFFIX = ".work"


class Job:
    """A connected MODEL, opened for conversion with its session: everything a method plans with.

    Attributes:
        model: the MODEL.
        info: its identity.
        session, path: its statistics, and their file.
        source: its tensors, LoRAs merged.
        layers: every Linear and Conv2d, in the source's order.
        by_name: the same by name.
        read: the weight of a layer, on the device that searches.

    Raises:
        HSWQError: missing or foreign statistics, a quantized model, only one of clip and vae.
    """

    def __init__(self, model: Any, clip: Any, vae: Any, session: str) -> None:
        path = path_of(session)
        self.model = model
        self.info = inspect_model(model)
        require_recorded(model, path)
        self.session = open_session(path, self.info)
        self.session.require_statistics(f"Session {session}")
        self.source = ModelSource(model, self.info, clip, vae)
        self.layers = source_layers(self.source, self.source.prefix, self.info.kinds)
        self.by_name = {layer.name: layer for layer in self.layers}
        self.read = _reader(self.source, self.layers)
        self.path = path

    def states(self) -> list[State]:
        """The recorded model calls of the session. Raises SessionError if there is no file of them."""
        return load_states(states_path(self.path), self.info.fingerprint, MAX_STATES).states

    def has_bias(self, name: str) -> bool:
        """Whether a layer has a bias."""
        return bias_key(name, self.source.prefix) in self.source.entries

    def smallest(self, encoding: Encoding | None = None) -> int:
        """See ``smallest_size``."""
        granularity = TENSOR if encoding is None else encoding.granularity
        return smallest_size(self.source.entries, self.source.prefix, self.layers, granularity)

    def room(self, target: Path, extra: int = 0) -> dict[Path, int]:
        """{file: bytes} that writing ``target`` takes at least, with so many bytes for layers in 16 bits."""
        beside = BYTES_BESIDE_A_LAYER * len(self.layers)
        return {target: self.smallest() + beside + min(extra, sum(layer.weights for layer in self.layers))}

    def room_for_work(self) -> dict[Path, int]:
        """{folder: bytes} that the codes of all layers take on their way, less what is there."""
        there = sum(file.stat().st_size for file in self.work_folder.rglob("*") if file.is_file())
        return {self.work_folder: max(0, sum(layer.weights for layer in self.layers) - there)}

    @property
    def work_folder(self) -> Path:
        """Where a long conversion keeps what it has done."""
        return self.path.with_suffix(WORK_SUFFIX)

    def target(self, budget: str, file_format: str, prefix: str) -> Path:
        """A file name of its own in the folder stock loaders look in. Raises FileError if it is not writable."""
        name = f"{self.source.name}_{describe(self.session.calls, budget)}_{file_format}"
        target = output_path(output_folder(whole=self.source.whole), prefix, name)
        require_writable(target.parent)
        return target

    def write(
        self, target: Path, plan: Plan, progress: Progress, solutions: Mapping[str, Solution] | None = None
    ) -> tuple[Conversion, str]:
        """Write and check the file of a plan; returns it and a report."""
        done = write_plan(
            target,
            self.source,
            self.source.prefix,
            plan,
            self.session,
            solutions=solutions or {},
            progress=progress,
            device=search_device(),
            check=lambda temporary: verify_file(temporary, plan, format_named(plan.file_format)),
        )
        log.info("HSWQ: %s: %s", done.path.name, plan.accounting())
        return done, report(done, self.session)


def _reader(source: ModelSource, layers: list[Layer]) -> Callable[[Layer], torch.Tensor]:
    """Weights on the device that searches."""
    device = search_device()
    make_room(layers, device)
    return lambda layer: source.read(weight_key(layer.name, source.prefix)).to(device)


def output_folder(*, whole: bool) -> Path:
    """``output/checkpoints`` or ``output/diffusion_models``: ComfyUI's loaders list both."""
    return Path(folder_paths.get_output_directory()) / ("checkpoints" if whole else "diffusion_models")
