"""Inspects finished files: dequantizes, compares and checks quantized weights and their scales."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ..convert.header import HEADER_KEY, declared_format, header_record
from ..errors import FileError
from ..files.checkpoint import CHECKPOINT_PREFIX, FileSource
from ..files.checks import shown
from ..model.kinds import KINDS_BY_RANK
from ..model.layer import WEIGHT
from ..plan.formats import MARKER, SCALE_SUFFIXES, format_named, marker_record, usable
from ..plan.plan import QUANTIZE
from ..quant.grid import FLOAT8_E4M3FN
from ..quant.metrics import sqnr_db
from ..quant.schemes.scheme import CODES, SCALE, Scheme
from ..quant.schemes.table import SCHEMES, holds_codes, scheme_stored


@dataclass(frozen=True)
class Difference:
    """One weight in two files.

    Attributes:
        key: its key in the second file.
        dtypes: its dtypes in both.
        sqnr_db: SQNR of the second relative to the first; infinite if equal, None if the shapes differ.
    """

    key: str
    dtypes: tuple[torch.dtype, torch.dtype]
    sqnr_db: float | None


class QuantizedFile:
    """A ``.safetensors`` file whose weights can be dequantized.

    Raises:
        FileError: see ``FileSource``.
    """

    def __init__(self, path: Path) -> None:
        self.source = FileSource(path)
        self.path = path

    def weights(self) -> list[str]:
        """Keys of every weight of rank 2 or 4, FP8 or not."""
        entries = self.source.entries
        return [key for key, info in entries.items() if key.endswith(WEIGHT) and len(info.shape) in KINDS_BY_RANK]

    def quantized(self) -> list[str]:
        """Keys of the quantized weights, of any rank."""
        entries = self.source.entries
        return [key for key, info in entries.items() if key.endswith(WEIGHT) and holds_codes(info.dtype)]

    def scheme(self, key: str) -> Scheme | None:
        """The scheme a weight is stored in; None: not quantized, or an unknown scheme."""
        scale_key, marker_key = self.scale_key(key), self._beside(key, MARKER)
        scales = 0 if scale_key is None else math.prod(self.source.entries[scale_key].shape)
        marked = None
        if marker_key in self.source.entries:
            marked = self._marked(marker_key)
        return scheme_stored(self.source.entries[key].dtype, scales, marked)

    def scale_key(self, key: str) -> str | None:
        """Key of a weight's scale, in any known spelling; None: it has none."""
        candidates = (self._beside(key, suffix) for suffix in SCALE_SUFFIXES)
        return next((scale_key for scale_key in candidates if scale_key in self.source.entries), None)

    def restored(self, key: str) -> torch.Tensor:
        """A weight in float32, dequantized if its scheme is known.

        Raises:
            FileError: its codes look like ours, but its marker names another format.
        """
        tensor, scheme, scale_key = self.source.read(key), self.scheme(key), self.scale_key(key)
        ours = any(row.dtype == tensor.dtype for row in SCHEMES.values())
        if scheme is None and ours and self._beside(key, MARKER) in self.source.entries:
            raise FileError(
                f"File {self.path.name}, tensor {key}",
                got=f"{tensor.dtype} in format {shown(self._marked(self._beside(key, MARKER)))}",
                expected=" or ".join(sorted({row.number_format for row in SCHEMES.values()})),
                remedy="Update this node pack, or use a file in one of these formats.",
            )
        if scheme is None:
            return tensor.to(torch.float32)
        scale = {} if scale_key is None else {SCALE: self.scale(key, scale_key)}
        return scheme.restored({CODES: tensor, **scale})

    def scale(self, key: str, scale_key: str) -> torch.Tensor:
        """The scale of a weight, float32. Raises FileError unless it has one value, or one per output channel."""
        shape, outputs = self.source.entries[scale_key].shape, self.source.entries[key].shape[:1]
        if math.prod(shape) not in (1, *outputs):
            raise FileError(
                f"File {self.path.name}, tensor {scale_key}",
                got=f"shape {shape}",
                expected=" or ".join(map(str, (1, *outputs))) + " values",
                remedy="The file is damaged: convert or download it again.",
            )
        return self.source.read(scale_key).to(torch.float32)

    def _marked(self, key: str) -> str:
        try:
            return str(marker_record(self.source.read(key))["format"])
        except ValueError as error:
            raise FileError(
                f"File {self.path.name}, tensor {key}",
                got=f"unreadable ({error})",
                expected="JSON that names a format",
                remedy="The file is damaged: convert or download it again.",
            ) from error

    @staticmethod
    def _beside(key: str, suffix: str) -> str:
        return f"{key.removesuffix(WEIGHT)}.{suffix}"


def compare(first: QuantizedFile, second: QuantizedFile) -> Iterator[Difference]:
    """Every weight of rank 2 or 4 in both files, in the second's order; either may lack the checkpoint prefix.

    Raises:
        FileError: the files have no weight in common.
    """
    known = set(first.weights())
    sources = {key: next((k for k in _spellings(key) if k in known), None) for key in second.weights()}
    if not any(sources.values()):
        raise FileError(
            f"File {second.path.name}",
            got=f"no weight that {first.path.name} has",
            expected="two files of one model",
            remedy="Compare a file with the one it was made from.",
        )
    for key, source in sources.items():
        if source is not None:
            yield _difference(first, source, second, key)


def _spellings(key: str) -> tuple[str, ...]:
    """A key unchanged, without, and with the prefix of full checkpoints."""
    bare = key.removeprefix(CHECKPOINT_PREFIX)
    return key, bare, CHECKPOINT_PREFIX + bare


def _difference(first: QuantizedFile, source: str, second: QuantizedFile, key: str) -> Difference:
    infos = first.source.entries[source], second.source.entries[key]
    dtypes = infos[0].dtype, infos[1].dtype
    if infos[0].shape != infos[1].shape:
        return Difference(key, dtypes, None)
    return Difference(key, dtypes, sqnr_db(first.restored(source), second.restored(key)))


def findings(path: Path) -> Iterator[str]:
    """Problems with a file, one line each; empty if it is sound.

    Raises:
        FileError: it cannot be read at all.
    """
    file = QuantizedFile(path)
    try:
        declared = declared_format(file.source.metadata, path.name)
    except FileError as error:
        yield str(error)
        declared = None
    layers = file.quantized()
    needs_scale = declared is not None and format_named(declared).all_scaled
    for key in layers:
        yield from _weight_findings(file, key, needs_scale=needs_scale)
    yield from _count_findings(file, declared, len(layers))


def _weight_findings(file: QuantizedFile, key: str, *, needs_scale: bool) -> Iterator[str]:
    codes = file.source.read(key)
    if codes.dtype == FLOAT8_E4M3FN.dtype and FLOAT8_E4M3FN.largest_code(codes) == FLOAT8_E4M3FN.nan_code:
        yield f"{key}: NaN codes"
    scale_key = file.scale_key(key)
    if scale_key is None:
        if needs_scale:
            yield f"{key}: no scale, which format v2 has for every FP8 weight"
        return
    try:
        scale = file.scale(key, scale_key)
    except FileError as error:
        yield str(error)
        return
    if not bool(usable(scale).all()):
        yield f"{scale_key}: NaN, infinity, zero or a negative number"


def _count_findings(file: QuantizedFile, declared: str | None, quantized: int) -> Iterator[str]:
    if declared is None:
        return
    counts = header_record(file.source.metadata[HEADER_KEY], file.path.name).get("counts")
    stated = counts.get(QUANTIZE) if isinstance(counts, dict) else None
    if stated != quantized:
        yield f"{quantized} FP8 weights, the header says {shown(stated)}"
