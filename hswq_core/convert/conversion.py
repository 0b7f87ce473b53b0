"""A finished file and its report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..calibration.session import Session
from ..model.families import GENERIC, Family, family_named
from ..plan.formats import FileFormat, format_for, format_named
from ..plan.plan import KEEP, LOSS, NEAREST_LOSS, Plan


@dataclass(frozen=True)
class Conversion:
    """A finished file.

    Attributes:
        path: the file.
        size: bytes of the file.
        source_bytes: bytes of the source's tensors.
        plan: what was done to each layer.
        session: the calibration session used; None if the method needs none.
        notes: additional lines for the report.
    """

    path: Path
    size: int
    source_bytes: int
    plan: Plan
    session: Session | None = None
    notes: tuple[str, ...] = ()

    @property
    def report(self) -> str:
        """Text for the node and the log: size, accounting, worst layer, where the file opens, and the notes."""
        plan, family = self.plan, family_named(self.plan.family)
        row = format_for(format_named(plan.file_format), family)
        lines = [
            f"{self.path.name}",
            f"{plan.family}, {row.name}, {' '.join(('method', plan.method, plan.budget)).strip()}, "
            f"{_calibration(self.session)}",
            f"{self.size / 2**20:.1f} MB ({self.size / max(self.source_bytes, 1):.1%} of the source)",
            plan.accounting(),
            *_kept_lines(plan),
            *_worst_lines(plan),
            *_learned_lines(plan),
            f"Opens in: {row.opens_in}.",
            *_warnings(row, family),
            *self.notes,
        ]
        return "\n".join(lines)


def _calibration(session: Session | None) -> str:
    return f"session of {session.calls} calls" if session else "without calibration"


def _kept_lines(plan: Plan) -> list[str]:
    return [f"kept, {reason}: {n}" for reason, n in sorted(plan.by_reason(KEEP).items())]


def _worst_lines(plan: Plan) -> list[str]:
    measured = [layer for layer in plan.layers if layer.sqnr_db is not None]
    if not measured:
        return []
    values = [layer.sqnr_db or 0.0 for layer in measured]
    worst = min(measured, key=lambda layer: layer.sqnr_db or 0.0)
    return [f"weight SQNR: mean {sum(values) / len(values):.1f} dB, worst {worst.sqnr_db:.1f} dB ({worst.name})"]


def _learned_lines(plan: Plan) -> list[str]:
    numbers = [(layer.numbers.get(LOSS), layer.numbers.get(NEAREST_LOSS)) for layer in plan.layers]
    tried = [(loss, nearest) for loss, nearest in numbers if loss is not None and nearest]
    if not tried:
        return []
    won = sum(loss < nearest for loss, nearest in tried)
    less = 1 - sum(loss / nearest for loss, nearest in tried) / len(tried)
    return [f"learned rounding: quantized loss {less:.0%} below nearest on average, {won} of {len(tried)} layers"]


def _warnings(row: FileFormat, family: Family) -> list[str]:
    notes = []
    if row.casts_kept:
        notes.append(
            "Stock loaders on cards with FP8 compute turn every layer of a v1 file to FP8, the kept ones too: "
            "open it in HSWQ Loader, or use the comfy format."
        )
    if family.text_encoder and not row.scaled_kinds():
        notes.append("ComfyUI widens it to 16 bits when it loads: half the file, but no less memory.")
    if family.name == GENERIC.name:
        notes.append("No known model family: all layers were treated alike (generic).")
    return notes
