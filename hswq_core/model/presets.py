"""Presets: options users can choose beyond the family's rules, one row each."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from ..errors import SettingError
from ..files.checkpoint import TensorInfo, TensorSource
from .families import NeverQuantized

ASKED = "asked for by the preset"


@dataclass(frozen=True)
class Preset:
    """One row.

    Attributes:
        name: the user-visible name.
        help: one phrase.
        drop: regular expressions matched against whole keys; matching tensors are left out of the file.
        keep: layers that stay in the source's precision.
    """

    name: str
    help: str
    drop: tuple[str, ...] = ()
    keep: tuple[NeverQuantized, ...] = ()

    def drops(self, key: str) -> bool:
        """Whether the tensor ``key`` is left out."""
        return any(re.fullmatch(pattern, key) for pattern in self.drop)


AUTO = "auto"
PRESETS = {
    row.name: row
    for row in (
        Preset(AUTO, "what the model's family needs"),
        Preset(
            "encoder_only",
            "T5: without decoder, lm_head and the copies of shared",
            drop=(r"decoder\..*", r"lm_head\..*", r"encoder\.embed_tokens\.weight"),
        ),
        Preset(
            "keep_guidance",
            "Chroma: distilled guidance layers stay in 16 bits",
            keep=(NeverQuantized(r"distilled_guidance_layer\..*", ASKED, "convert_to_quant"),),
        ),
    )
}


def preset_named(name: str) -> Preset:
    """The row called ``name``; SettingError for any other."""
    if name not in PRESETS:
        raise SettingError("preset", got=repr(name), expected=" or ".join(PRESETS), remedy="Choose one of them.")
    return PRESETS[name]


class Remaining:
    """A source minus the tensors a preset drops."""

    def __init__(self, source: TensorSource, preset: Preset) -> None:
        self._source = source
        self.name, self.metadata = source.name, source.metadata
        self.entries: Mapping[str, TensorInfo] = dict(self._kept(source, preset))
        self.dropped = len(source.entries) - len(self.entries)

    @staticmethod
    def _kept(source: TensorSource, preset: Preset) -> Iterator[tuple[str, TensorInfo]]:
        return ((key, info) for key, info in source.entries.items() if not preset.drops(key))

    def read(self, key: str) -> torch.Tensor:
        """The tensor ``key`` as ``entries[key]`` describes it."""
        return self._source.read(key)
