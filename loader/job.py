"""A connected MODEL, opened for conversion: its session, its tensors, and the file it becomes."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import folder_paths
import torch

from ..hswq_core.calibration.session import Session
from ..hswq_core.calibration.states import MAX_STATES, State
from ..hswq_core.calibration.states_file import load_states, states_path
from ..hswq_core.convert.conversion import Conversion
from ..hswq_core.convert.output import Output, source_layers
from ..hswq_core.files.atomic import require_writable
from ..hswq_core.files.names import output_path
from ..hswq_core.methods.solutions import key_of
from ..hswq_core.methods.solve import Solution
from ..hswq_core.model.fingerprint import sample_weights
from ..hswq_core.model.layer import Layer, bias_key, weight_key
from ..hswq_core.plan.budget import BYTES_BESIDE_A_LAYER, kept_bytes, smallest_size
from ..hswq_core.plan.encoding import Encoding
from ..hswq_core.plan.formats import format_named
from ..hswq_core.plan.plan import Plan
from ..hswq_core.progress import Progress
from .calibration.model import require_recorded
from .devices import search_device
from .model import ModelInfo, inspect_model
from .open.verify import verify_file
from .sessions.store import open_session, path_of
from .source import ModelSource

if TYPE_CHECKING:
    from .comfyui.types import CLIP, VAE, ModelPatcher

log = logging.getLogger(__name__)

WORK_SUFFIX = ".work"
# Version of the work kept on disk; work of any other is discarded.
WORK_VERSION = "5"


@dataclass(frozen=True)
class Job:
    """A connected MODEL, opened for conversion with its session: everything a method plans with.

    Attributes:
        model: the MODEL.
        info: its identity.
        session, path: its statistics, and their file.
        source: its tensors, LoRAs merged.
        layers: every layer, in the source's order.
    """

    model: ModelPatcher
    info: ModelInfo
    session: Session
    path: Path
    source: ModelSource
    layers: list[Layer]

    @classmethod
    def open(cls, model: ModelPatcher, clip: CLIP | None, vae: VAE | None, session: str) -> Job:
        """Inspect everything; nothing is loaded or unloaded.

        Raises:
            HSWQError: missing or foreign statistics, a quantized model, only one of clip and vae.
        """
        path, info = path_of(session), inspect_model(model)
        require_recorded(model, path)
        statistics = open_session(path, info)
        statistics.require_statistics(f"Session {session}")
        source = ModelSource(model, info, clip, vae)
        return cls(model, info, statistics, path, source, source_layers(source, source.prefix, info.kinds))

    @cached_property
    def by_name(self) -> dict[str, Layer]:
        """The layers by name."""
        return {layer.name: layer for layer in self.layers}

    def read(self, layer: Layer) -> torch.Tensor:
        """The weight of a layer, on the search device."""
        return self.source.read(weight_key(layer.name, self.source.prefix)).to(search_device())

    def states(self) -> list[State]:
        """The recorded model calls of the session. Raises SessionError if their file is missing."""
        return load_states(states_path(self.path), self.info.fingerprint, MAX_STATES).states

    def has_bias(self, name: str) -> bool:
        """Whether a layer has a bias."""
        return bias_key(name, self.source.prefix) in self.source.entries

    def smallest(self, encoding: Encoding) -> int:
        """See ``smallest_size``."""
        return smallest_size(self.source.entries, self.source.prefix, self.layers, encoding.scheme)

    def codes_size(self, encoding: Encoding) -> int:
        """Bytes of all layers once quantized."""
        return sum(encoding.scheme(layer.kind).nbytes(layer.shape) for layer in self.layers)

    def room(self, target: Path, encoding: Encoding, extra: int = 0) -> dict[Path, int]:
        """{file: bytes} that writing ``target`` takes at least, with ``extra`` bytes for layers kept in 16 bits."""
        overhead = BYTES_BESIDE_A_LAYER * len(self.layers)
        most = sum(kept_bytes(layer.shape) for layer in self.layers) - self.codes_size(encoding)
        return {target: self.smallest(encoding) + overhead + min(extra, most)}

    def room_for_work(self, encoding: Encoding) -> dict[Path, int]:
        """{folder: bytes} that the codes of all layers take while converting, less what is already there."""
        existing = sum(file.stat().st_size for file in self.work_folder.rglob("*") if file.is_file())
        return {self.work_folder: max(0, self.codes_size(encoding) - existing)}

    @property
    def work_folder(self) -> Path:
        """Where a long conversion saves its progress."""
        return self.path.with_suffix(WORK_SUFFIX)

    def work_key(self, method: str, states: list[State], encoding: Encoding) -> str:
        """Identifies everything that rounded layers and their probes depend on, which excludes the budget."""
        weights = self.info.fingerprint.weights
        if self.model.patches:  # the fingerprint is of the model without its LoRAs
            weights = sample_weights(self.by_name, lambda name: self.read(self.by_name[name]))
        marks = ",".join(state.mark for state in states)
        return key_of(WORK_VERSION, method, self.info.fingerprint.layout, str(weights.tolist()), marks, encoding.text)

    def target(self, tail: str, file_format: str, prefix: str) -> Path:
        """An unused file name in the folder stock loaders look in. Raises FileError if it is not writable."""
        name = f"{self.source.name}_{tail}_{file_format}"
        target = output_path(output_folder(whole=self.source.whole), prefix, name)
        require_writable(target.parent)
        return target

    def write(
        self, target: Path, plan: Plan, progress: Progress, solutions: Mapping[str, Solution] | None = None
    ) -> Conversion:
        """Write the file of a plan, and verify it."""
        output = Output(self.source, self.source.prefix, plan, self.session, solutions or {}, search_device())
        row = format_named(plan.file_format)
        done = output.write(target, progress, check=lambda temporary: verify_file(temporary, plan, row))
        log.info("HSWQ: %s: %s", done.path.name, plan.accounting())
        return done


def output_folder(*, whole: bool) -> Path:
    """``output/checkpoints`` or ``output/diffusion_models``: ComfyUI's loaders list both."""
    return Path(folder_paths.get_output_directory()) / ("checkpoints" if whole else "diffusion_models")
