"""The keys FP8 files use for a layer's scales, translated to ``X.weight_scale`` and ``X.input_scale``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import comfy.model_detection
import torch

from ...hswq_core.convert.header import declared_format
from ...hswq_core.errors import FileError
from ...hswq_core.files.checks import shown
from ...hswq_core.plan.formats import INPUT_SCALE, MARKER, SCALE_SUFFIXES, format_named, marker_record, usable
from ...hswq_core.quant.grid import FLOAT8_E4M3FN
from ...hswq_core.quant.schemes.scheme import SCALE

if TYPE_CHECKING:
    from ..comfyui.types import StateDict

INPUT_SCALE_SUFFIXES = (INPUT_SCALE, "scale_input")
LEGACY_MARKER = "scaled_fp8"
REMEDY = "The file is damaged or of another kind: convert or download it again, or try a stock loader."


def key_prefix(state: Mapping[str, object]) -> str:
    """Prefix of the diffusion model's keys in a file or state dict, "" if it has none."""
    prefix: str = comfy.model_detection.unet_prefix_from_state_dict(dict(state))
    return prefix if any(key.startswith(prefix) for key in state) else ""


def normalize_keys(
    state: StateDict, prefix: str, file_name: str, metadata: Mapping[str, str] | None = None
) -> StateDict:
    """A state dict in which an FP8 layer X under ``prefix`` has ``X.weight`` and at most two scales beside it.

    ``X.weight_scale``, 1 if absent; ``X.input_scale`` only where the file lets a loader cast the inputs too.
    ``X.scale`` counts as a scale only beside an FP8 ``X.weight``: Flux uses that name for the weights of its norms.

    Raises:
        FileError: a scale that does not fit its weight's shape, or is NaN, infinite, zero or negative; two scales for
            one layer; a scale without an FP8 weight, or a missing one; an unknown quantization or header version.
    """
    file = _File(dict(state), prefix, file_name, declared_format(metadata, file_name))
    legacy = file.state.pop(f"{prefix}{LEGACY_MARKER}", None)
    layers = file.quantized()
    for layer in layers:
        file.normalize(layer, inputs_too=legacy is not None and legacy.numel() != 2)
    file.require_usable()
    file.require_owned(layers)
    file.require_complete(layers)
    return file.state


@dataclass(frozen=True)
class _File:
    """A state dict being normalized.

    Attributes:
        state: changed in place.
        declared: the format its header declares, None if it has none.
        scales: every scale seen so far, by its key in the file.
    """

    state: StateDict
    prefix: str
    name: str
    declared: str | None
    scales: dict[str, torch.Tensor] = field(default_factory=dict)

    def quantized(self) -> list[str]:
        """``"X."`` of every layer with an FP8 weight."""
        weights = [key for key in self.state if key.startswith(self.prefix) and key.endswith(".weight")]
        return [key[: -len("weight")] for key in weights if self.state[key].dtype == FLOAT8_E4M3FN.dtype]

    def normalize(self, layer: str, *, inputs_too: bool) -> None:
        """Spell a layer's scales one way; ``inputs_too``: whether to keep its input scale if it has no marker."""
        marker = self.state.pop(f"{layer}{MARKER}", None)
        if marker is not None:
            inputs_too = not self._marked(layer, marker).get("full_precision_matrix_mult", False)
        scale = self._taken(layer, SCALE_SUFFIXES, (1, self.state[f"{layer}weight"].shape[0]))
        if scale is not None:
            self.state[f"{layer}{SCALE}"] = scale
        elif marker is not None:
            raise self._bad(f"{layer}{SCALE}", f"none beside {MARKER}", "a scale")
        scale = self._taken(layer, INPUT_SCALE_SUFFIXES, (1,))
        if scale is not None and inputs_too:
            self.state[f"{layer}{INPUT_SCALE}"] = scale

    def require_owned(self, layers: list[str]) -> None:
        """Raise FileError for a weight_scale whose weight is not FP8: the file is not what it claims to be."""
        owned = {f"{layer}{SCALE}" for layer in layers}
        for key in self.state:
            if key.startswith(self.prefix) and key.endswith(f".{SCALE}") and key not in owned:
                raise self._bad(key, "no FP8 weight beside it", "an FP8 weight of the same layer")

    def require_complete(self, layers: list[str]) -> None:
        """Raise FileError for a lost scale: without it the layer would blow up and the picture be black.

        Format v2 has one for every layer. Without our header only this is known: codes that reach the largest one
        were scaled, since no weight of a diffusion model is 448.
        """
        bare = [layer for layer in layers if f"{layer}{SCALE}" not in self.state]
        all_scaled = self.declared is not None and format_named(self.declared).all_scaled
        lost = bare if all_scaled else []
        if self.declared is None and len(bare) < len(layers):
            lost = [
                layer
                for layer in bare
                if FLOAT8_E4M3FN.largest_code(self.state[f"{layer}weight"]) >= FLOAT8_E4M3FN.max_code
            ]
        if lost:
            raise self._bad(f"{lost[0]}{SCALE}", "no such key", "a scale, as other FP8 weights of the file have")

    def _marked(self, layer: str, marker: torch.Tensor) -> dict[str, Any]:
        """The JSON of a layer's marker."""
        try:
            record = marker_record(marker)
        except ValueError as error:
            raise self._bad(f"{layer}{MARKER}", f"unreadable JSON ({error})", "a format name") from error
        if record["format"] != FLOAT8_E4M3FN.name:
            raise self._bad(f"{layer}{MARKER}", f"format {shown(record['format'])}", FLOAT8_E4M3FN.name)
        return record

    def _taken(self, layer: str, suffixes: tuple[str, ...], sizes: tuple[int, ...]) -> torch.Tensor | None:
        """Pop the one tensor of a layer spelled in any of these ways; it must have the size of a scale."""
        keys = [f"{layer}{suffix}" for suffix in suffixes if f"{layer}{suffix}" in self.state]
        if not keys:
            return None
        if len(keys) > 1:
            raise self._bad(keys[1], f"a second scale beside {keys[0]}", "one scale for each layer")
        scale = self.state.pop(keys[0])
        if scale.numel() not in sizes:
            raise self._bad(keys[0], f"shape {tuple(scale.shape)}", f"{' or '.join(map(str, sizes))} values")
        self.scales[keys[0]] = scale
        return scale

    def require_usable(self) -> None:
        """Raise FileError for NaN, infinite, zero or negative scales (black pictures), all at once for speed."""
        if not self.scales:
            return
        values = torch.cat([scale.reshape(-1).to(torch.float32) for scale in self.scales.values()])
        wrong = ~usable(values)
        if wrong.any():
            keys = [key for key, scale in self.scales.items() for _ in range(scale.numel())]
            key = keys[int(wrong.nonzero()[0])]
            raise self._bad(key, "NaN, infinity, zero or a negative number", "finite scales above 0")

    def _bad(self, key: str, got: str, expected: str) -> FileError:
        return FileError(f"File {self.name}, tensor {key}", got=got, expected=expected, remedy=REMEDY)
