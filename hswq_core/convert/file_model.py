"""A diffusion model in a file, without ComfyUI: its layers and its session."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from ..calibration.session import Session
from ..errors import FileError
from ..files.checkpoint import FileSource, TensorInfo, model_prefix
from ..model.families import GENERIC, detect_family
from ..model.fingerprint import Fingerprint, layout_hash, sample_weights
from ..model.kinds import KINDS_BY_RANK
from ..model.layer import Layer, layer_of, weight_key
from ..model.presets import AUTO, PRESETS, Preset, Remaining
from .output import source_layers


class FileModel:
    """The layers of a ``.safetensors`` file.

    Attributes:
        source: the file, minus what the preset drops.
        preset: options beyond the family's rules.
        session: calibration session of this model; None if not needed.
        prefix: prefix of the diffusion model's keys; may be "".
        family: row of the families table.
        device: where weights are processed.
        layers: every Linear and Conv2d in file order: those named in the session, else every weight of rank 2 or 4.

    Args:
        path: the file.
        session: calibration session of this model; None if not needed.
        preset: a row of the presets table.
        device: where weights are processed.

    Raises:
        FileError: not a safetensors file, or neither a session nor a known family to tell layers from other matrices.
        SessionError: the session is of another model.
        LayerError: a layer of the session is missing from the file.
    """

    def __init__(
        self, path: Path, session: Session | None = None, preset: Preset = PRESETS[AUTO], device: str = "cpu"
    ) -> None:
        self.preset, self.session, self.device = preset, session, torch.device(device)
        self.source = Remaining(FileSource(path, device), preset)
        keys = list(self.source.entries)
        self.prefix = model_prefix(keys)
        inner = {key[len(self.prefix) :]: self.source.entries[key] for key in keys if key.startswith(self.prefix)}
        self.family = detect_family({key: info.shape for key, info in inner.items()})
        if session is None and self.family.name == GENERIC.name:
            raise FileError(
                f"File {path.name}",
                got="a model of no known family, and no session",
                expected="a session, which says what its layers are",
                remedy="Calibrate the model in ComfyUI and pass the session with --session.",
            )
        kinds = {name: stats.kind for name, stats in session.layers.items()} if session else _kinds(inner)
        self.layers = source_layers(self.source, self.prefix, kinds)
        if session is not None:
            session.fingerprint.require_same(self.fingerprint(), f"File {path.name}")

    def notes(self) -> list[str]:
        """Lines for the report."""
        if not self.source.dropped:
            return []
        return [f"left out, as preset {self.preset.name} says: {self.source.dropped} tensors"]

    def read(self, layer: Layer) -> torch.Tensor:
        """The weight of a layer."""
        return self.source.read(weight_key(layer.name, self.prefix))

    def fingerprint(self) -> Fingerprint:
        """Fingerprint of the model, as recorded in a session."""
        by_name = {layer.name: layer for layer in self.layers}
        layout = layout_hash({name: (layer.kind, layer.shape) for name, layer in by_name.items()})
        return Fingerprint(layout, sample_weights(by_name, lambda name: self.read(by_name[name])))


def _kinds(inner: Mapping[str, TensorInfo]) -> dict[str, str]:
    """{layer name: kind} for every weight whose rank is that of a layer kind."""
    ranks = {layer_of(key): len(info.shape) for key, info in inner.items()}
    return {name: KINDS_BY_RANK[rank] for name, rank in ranks.items() if name is not None and rank in KINDS_BY_RANK}
