"""Report on a quantized file: from its plan, or, for other tools' files, from its tensors."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from ..convert.header import HEADER_KEY, declared_format, declared_plan, header_record
from ..errors import FileError
from ..files.checkpoint import TensorInfo, model_prefix, read_header
from ..files.tensor_header import DTYPE_NAMES
from ..model.kinds import KINDS_BY_RANK
from ..model.layer import layer_of, weight_key
from ..plan.budget import choose_kept, kept_bytes, per_byte, size_with
from ..plan.formats import FORMATS
from ..plan.plan import KEEP, QUANTIZE, LayerPlan, Plan
from ..quant.metrics import error_to_db
from ..quant.schemes.scheme import CODES
from ..quant.schemes.table import holds_codes
from .table import Row, markdown, megabytes

CHANGE, SENSITIVITY = "change of the output, %", "sensitivity"
# Points of a curve; each requires one selection among all layers.
MOST_POINTS = 128
Entries = Mapping[str, TensorInfo]


@dataclass(frozen=True)
class Curve:
    """Quality over size: change of the model's output due to 8-bit layers, over the extra bytes of 16-bit layers.

    Attributes:
        smallest: bytes of the file's tensors with every layer in 8 bits.
        points: (extra bytes, dB) for budgets from none to all, ascending.
        chosen: the point of this file; None if no measured layer is in 8 bits.
    """

    smallest: int
    points: tuple[tuple[int, float], ...]
    chosen: tuple[int, float] | None


@dataclass(frozen=True)
class FileReport:
    """A file's report.

    Attributes:
        name: name of the file.
        facts: short lines, most important first.
        rows: layers in model order.
        measure: meaning of ``Row.measure``, with its unit; "" if nothing was measured.
        nbytes, smallest: total bytes of the tensors, and the total with every layer in 8 bits.
        curve: None if the change of the model's output was not measured.
    """

    name: str
    facts: tuple[str, ...]
    rows: tuple[Row, ...]
    measure: str
    nbytes: int
    smallest: int
    curve: Curve | None

    @property
    def extra(self) -> float:
        """Bytes beyond ``smallest``, as a share of it."""
        return (self.nbytes - self.smallest) / max(self.smallest, 1)

    def markdown(self) -> str:
        """Facts and a table of layers, worst first."""
        columns = ("layer", "kind", "bits", "why", self.measure or "measured", "weight SQNR, dB", "MB")
        cells = [
            (r.name, r.kind, 8 if r.action == QUANTIZE else 16, r.reason, r.measure, r.sqnr_db, r.nbytes / 2**20)
            for r in worst_first(self.rows)
        ]
        used = [i for i in range(len(columns)) if any(row[i] not in (None, "") for row in cells)]
        rows = [[row[i] for i in used] for row in cells]
        return markdown(self.name, self.facts, [columns[i] for i in used], rows)


def worst_first(rows: tuple[Row, ...]) -> list[Row]:
    """Rows by measure, then by weight SQNR, then by bytes."""

    def badness(row: Row) -> tuple[float, float, int]:
        sqnr = math.inf if row.sqnr_db is None else row.sqnr_db
        return (-math.inf if row.measure is None else row.measure, -sqnr, row.nbytes)

    return sorted(rows, key=badness, reverse=True)


def report_file(path: Path) -> FileReport:
    """Report on a quantized file from its header; no tensor is read.

    Raises:
        FileError: not a safetensors file, no FP8 weights, or a damaged header.
    """
    metadata, entries = read_header(path)
    if not any(holds_codes(info.dtype) for info in entries.values()):
        raise FileError(
            f"File {path.name}",
            got="no FP8 weight",
            expected="a file converted to FP8",
            remedy="Choose a converted file, or convert this one first.",
        )
    declared_format(metadata, path.name)
    plan = declared_plan(metadata, path.name)
    return _foreign(path.name, entries) if plan is None else _planned(path.name, metadata, entries, plan)


def _planned(name: str, metadata: Mapping[str, str], entries: Entries, plan: Plan) -> FileReport:
    prefix = model_prefix(entries)
    stored = {layer.name: _stored(name, entries, prefix, layer) for layer in plan.layers}
    measure = CHANGE if any(layer.change is not None for layer in plan.layers) else ""
    if not measure and any(layer.sensitivity for layer in plan.layers):
        measure = SENSITIVITY
    rows = tuple(_row(layer, stored[layer.name], measure) for layer in plan.layers)
    codes = {weight_key(layer.name, prefix): _code_bytes(plan, layer) for layer in plan.layers}
    nbytes, smallest = _sizes(entries, codes)
    curve = _curve(plan, smallest) if measure == CHANGE else None
    made = f"{plan.family}, format {plan.file_format}, {' '.join(('method', plan.method, plan.budget)).strip()}"
    facts = (made, plan.accounting(), _size_fact(nbytes, smallest), *_session_facts(metadata, name))
    return FileReport(name, (*facts, *_curve_facts(plan, curve)), rows, measure, nbytes, smallest, curve)


def _stored(name: str, entries: Entries, prefix: str, layer: LayerPlan) -> TensorInfo:
    info = entries.get(weight_key(layer.name, prefix))
    if info is None or not _as_planned(info, layer):
        raise FileError(
            f"File {name}, layer {layer.name}",
            got="none" if info is None else f"{DTYPE_NAMES[info.dtype]} {list(info.shape)}",
            expected=f"{layer.action} {list(layer.shape)}, as its plan says",
            remedy="The file was changed after it was converted: convert again.",
        )
    return info


def _as_planned(info: TensorInfo, layer: LayerPlan) -> bool:
    """Whether a tensor matches its plan; a later release's scheme may store it in any way."""
    if layer.action != QUANTIZE:
        return info.shape == layer.shape and not holds_codes(info.dtype)
    if layer.stored is None:
        return bool(layer.scheme)
    codes = layer.stored.described(layer.shape)[CODES]
    return info == TensorInfo(codes.dtype, tuple(codes.shape))


def _code_bytes(plan: Plan, layer: LayerPlan) -> int:
    """Bytes of a layer's codes; if it was kept, those in the format's default scheme."""
    row = FORMATS.get(plan.file_format)  # a later release may have more formats and kinds
    scheme = layer.stored or (row.usual(layer.kind) if row is not None and layer.kind in row.schemes else None)
    return math.prod(layer.shape) if scheme is None else scheme.code_bytes(layer.shape)


def _row(layer: LayerPlan, info: TensorInfo, measure: str) -> Row:
    value = layer.sensitivity if measure == SENSITIVITY else None
    if measure == CHANGE and layer.change is not None:
        value = 100 * math.sqrt(layer.change)
    return Row(layer.name, layer.kind, layer.action, layer.reason, info.nbytes, value, layer.sqnr_db)


def _sizes(entries: Entries, codes: Mapping[str, int]) -> tuple[int, int]:
    """(total bytes of the tensors, total with every layer quantized to the sizes in ``codes``)."""
    return sum(info.nbytes for info in entries.values()), size_with(entries, codes)


def _size_fact(nbytes: int, smallest: int) -> str:
    more = (nbytes - smallest) / max(smallest, 1)
    return f"{megabytes(nbytes)}, {more:+.1%} beyond every layer in 8 bits ({megabytes(smallest)})"


def _session_facts(metadata: Mapping[str, str], name: str) -> list[str]:
    session = header_record(metadata[HEADER_KEY], name).get("session") if HEADER_KEY in metadata else None
    if not isinstance(session, dict):
        return ["without calibration"]
    return [f"calibrated on {session.get('calls')} calls, {session.get('images')} images"]


def _curve(plan: Plan, smallest: int) -> Curve:
    change = {layer.name: layer.change for layer in plan.layers if layer.change is not None}
    cost = {layer.name: kept_bytes(layer.shape) - _code_bytes(plan, layer) for layer in plan.layers}
    never = sum(cost[layer.name] for layer in plan.layers if layer.change is None and layer.action != QUANTIZE)

    def point(kept: Collection[str]) -> tuple[int, float]:
        left = sum(value for name, value in change.items() if name not in kept)
        return never + sum(cost[name] for name in kept), error_to_db(math.sqrt(left))

    chosen = {layer.name for layer in plan.layers if layer.action != QUANTIZE and layer.name in change}
    cumulative = [0, *accumulate(cost[name] for name in per_byte(change, cost))]
    budgets = {*cumulative[:: 1 + len(cumulative) // MOST_POINTS], sum(cost[name] for name in chosen)}
    candidates = {point(choose_kept(change, cost, budget)) for budget in budgets}
    points = sorted((extra, db) for extra, db in candidates if math.isfinite(db))
    own = point(chosen)
    return Curve(smallest, tuple(points), own if math.isfinite(own[1]) else None)


def _curve_facts(plan: Plan, curve: Curve | None) -> list[str]:
    if curve is None:
        return [f"method {plan.method} measures no change of the model's output: no curve of size and quality"]
    if not curve.chosen or not curve.points:
        return []
    return [
        f"model output, by the sum of the layers' own changes: {curve.chosen[1]:.1f} dB; "
        f"with every layer in 8 bits {curve.points[0][1]:.1f} dB"
    ]


def _foreign(name: str, entries: Entries) -> FileReport:
    prefix = model_prefix(key for key, info in entries.items() if holds_codes(info.dtype))
    names = {key: layer_of(key, prefix) for key, info in entries.items() if len(info.shape) in KINDS_BY_RANK}
    layers = {name: entries[key] for key, name in names.items() if name is not None}
    rows = tuple(
        Row(
            name,
            KINDS_BY_RANK[len(info.shape)],
            QUANTIZE if holds_codes(info.dtype) else KEEP,
            DTYPE_NAMES[info.dtype],
            info.nbytes,
        )
        for name, info in layers.items()
    )
    nbytes, smallest = _sizes(
        entries, {weight_key(name, prefix): math.prod(info.shape) for name, info in layers.items()}
    )
    sizes = Counter[str]()
    for info in entries.values():
        sizes[DTYPE_NAMES[info.dtype]] += info.nbytes
    counts = Counter(row.action for row in rows)
    facts = (
        "made by another tool, or before plans were written: no measurements in it",
        f"{counts[QUANTIZE]} layers in FP8 + {counts[KEEP]} wider = {len(rows)} layers",
        _size_fact(nbytes, smallest),
        ", ".join(f"{dtype}: {megabytes(size)}" for dtype, size in sizes.most_common()),
    )
    return FileReport(name, facts, rows, "", nbytes, smallest, None)
