"""Observation of text encoders while they encode prompts: one session for each encoder of a CLIP."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ...hswq_core.errors import LayerError
from ...hswq_core.files.atomic import require_writable
from ..comfyui.layers import weight_of
from ..model import ModelInfo, inspect_layers, is_eight_bit, layer_modules
from .record import HookSet, Recorder

if TYPE_CHECKING:
    from ..comfyui.types import CLIP

ENCODE = "encode_token_weights"
# ComfyUI creates it where a file has none.
NOT_IN_EVERY_FILE = "text_projection"


class TextCalibrator:
    """Replaces a CLIP's ``encode_token_weights``, and records what its layers see.

    Args:
        inner: called to encode.
        path: the MODEL's session; an encoder's is beside it, see ``encoder_path``.
        encoders: {name: (its layers, their identity)}.
        report: called with one line after each save.

    Raises:
        SessionError: the session of an encoder is damaged, or of another encoder.
    """

    def __init__(
        self,
        inner: Callable[..., object],
        path: Path,
        encoders: dict[str, tuple[dict[str, torch.nn.Module], ModelInfo]],
        report: Callable[[str], None],
    ) -> None:
        self.inner, self.path, self.report = inner, path, report
        self._layers = {name: modules for name, (modules, _) in encoders.items()}
        self._records = {name: Recorder(encoder_path(path, name), info) for name, (_, info) in encoders.items()}
        self._lock = threading.Lock()

    def __call__(self, *args: object, **kwargs: object) -> object:
        """Encode a prompt."""
        with self._lock:
            hooks = {name: HookSet(modules) for name, modules in self._layers.items()}
            try:
                encoded = self.inner(*args, **kwargs)
            finally:
                for hook_set in hooks.values():
                    hook_set.remove()
            for name, hook_set in hooks.items():
                self._close(name, hook_set)
        return encoded

    def _close(self, name: str, hooks: HookSet) -> None:
        """Count one more prompt; an encoder that was not used for it records nothing."""
        record = self._records[name]
        record.drain(hooks)
        if not any(stats.in_calls for stats in record.part.layers.values()):
            return
        record.part.calls += 1
        if record.refuse_bad():
            return
        record.save()
        self.report(record.status(name))


def encoder_path(path: Path, encoder: str) -> Path:
    """``<session>_<encoder>.pt``, for example session_01_t5xxl.pt."""
    return path.with_name(f"{path.stem}_{encoder}.pt")


def calibrated_clip(clip: CLIP, path: Path, report: Callable[[str], None]) -> CLIP:
    """A clone of ``clip`` whose encoding of prompts is recorded, except for quantized encoders.

    Raises:
        HSWQError: all encoders are quantized, a session of another encoder, an unwritable folder.
    """
    clone = clip.clone()
    encoders = {
        name: (modules, inspect_layers(clip.patcher, modules, f"{name}.transformer."))
        for name, modules in _encoders(clip.cond_stage_model)
    }
    if not encoders:
        raise LayerError(
            "HSWQ Calibration, clip",
            got="no text encoder in 16 bits",
            expected="float16, bfloat16 or float32",
            remedy="Load the original FP16/BF16 text encoder, or disconnect clip.",
        )
    require_writable(path.parent)
    inner = clone.patcher.get_model_object(ENCODE)
    if isinstance(inner, TextCalibrator) and inner.path == path:  # two nodes of one session in series record once
        inner = inner.inner
    clone.patcher.add_object_patch(ENCODE, TextCalibrator(inner, path, encoders, report))
    return clone


def _encoders(model: torch.nn.Module) -> Iterator[tuple[str, dict[str, torch.nn.Module]]]:
    """(name, layers) of each encoder in 16 bits or more."""
    for name, child in model.named_children():
        transformer = getattr(child, "transformer", None)
        if isinstance(transformer, torch.nn.Module):
            modules = {key: m for key, m in layer_modules(transformer).items() if key != NOT_IN_EVERY_FILE}
            if modules and not any(is_eight_bit(weight_of(module)) for module in modules.values()):
                yield name, modules
