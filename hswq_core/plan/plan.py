"""The plan: which layer is kept or quantized, why, with which numbers. Accounting closes or it raises."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..errors import LayerError
from ..files.checks import checked, count, label, parse_json, shown, text
from .formats import TENSOR

QUANTIZE, KEEP, SKIP = "quantize", "keep", "skip"
ACTIONS = (QUANTIZE, KEEP, SKIP)


@dataclass(frozen=True)
class LayerPlan:
    """The decision about one layer.

    Attributes:
        name: layer name inside the diffusion model.
        kind: "Linear" or "Conv2d".
        shape: weight shape.
        action: "quantize"; "keep": in the source's 16-bit precision by choice of the method;
            "skip": never eligible (see ``reason``).
        reason: one phrase.
        scaled: quantized with a stored scale.
        amax: clip limit, 0 unless quantized.
        sensitivity: output variance (HSWQ).
        sqnr_db: SQNR of the quantized weight in dB; None if not quantized, or if the codes are exact.
        change: squared relative change of the model's output with this layer alone in 8 bits; None: not measured.
        damping: of compensated rounding, as a share of the mean diagonal of G; 0 where it was not tried.
        dead: input columns that calibration never reached.
        input_amax: clip limit of the inputs where a loader may multiply in 8 bits; 0 elsewhere.
        loss, nearest_loss: quantized loss of learned rounding and of nearest; None: not learned.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    action: str
    reason: str
    scaled: bool = False
    amax: float = 0.0
    sensitivity: float = 0.0
    sqnr_db: float | None = None
    change: float | None = None
    damping: float = 0.0
    dead: int = 0
    input_amax: float = 0.0
    loss: float | None = None
    nearest_loss: float | None = None

    @property
    def weights(self) -> int:
        """Number of weight elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Plan:
    """A whole conversion.

    Attributes:
        file_format: "v1", "v2" or "comfy".
        method: "hswq", ...
        budget: what the user asked for, as it appears in the file name ("0.25"); "" for a method that has none.
        family: row of the families table.
        grid: name of the 8-bit grid.
        layers: every Linear and Conv2d of the model, in model order.
        granularity: what one scale serves: a "tensor" or a "channel".
    """

    file_format: str
    method: str
    budget: str
    family: str
    grid: str
    layers: tuple[LayerPlan, ...]
    granularity: str = TENSOR

    def counts(self) -> dict[str, int]:
        """{"quantize": n, "keep": n, "skip": n}, all three always present."""
        found = Counter(layer.action for layer in self.layers)
        return {action: found[action] for action in ACTIONS}

    def by_reason(self, action: str) -> dict[str, int]:
        """How many layers of ``action`` for each reason."""
        return dict(Counter(layer.reason for layer in self.layers if layer.action == action))

    def require_closed(self, expected: int) -> None:
        """Raise LayerError unless quantized + kept + skipped = ``expected`` layers, each named once."""
        names = {layer.name for layer in self.layers}
        unknown = [layer.name for layer in self.layers if layer.action not in ACTIONS]
        if unknown or len(names) != len(self.layers) or len(names) != expected:
            raise LayerError(
                "Accounting of layers",
                got=f"{self.counts()} of {expected} layers, {len(names)} distinct names, {len(unknown)} undecided",
                expected="quantized + kept + skipped = all layers",
                remedy="This is a bug of this pack; please report it with the model's name.",
            )

    def accounting(self) -> str:
        """One line: "n quantized + n kept + n skipped (reason: n, ...) = n layers"."""
        counts = self.counts()
        reasons = ", ".join(f"{reason}: {n}" for reason, n in sorted(self.by_reason(SKIP).items()))
        skipped = f"{counts[SKIP]} skipped" + (f" ({reasons})" if reasons else "")
        return f"{counts[QUANTIZE]} quantized + {counts[KEEP]} kept + {skipped} = {len(self.layers)} layers"

    def to_json(self, indent: int | None = None) -> str:
        """JSON text, on one line unless indented; ``from_json`` gives the same plan back."""
        return json.dumps(asdict(self), indent=indent, separators=(",", ":") if indent is None else None)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read ``to_json``'s text. Raises ValueError on anything else."""
        data = checked(parse_json(text, finite=False), dict)
        layers = tuple(_layer_plan(checked(record, dict)) for record in checked(data.pop("layers", None), list))
        names = {f.name for f in fields(cls)} - {"layers"}
        if set(data) != names:
            raise ValueError(f"a plan without {sorted(names - set(data))} or with more than {sorted(names)}")
        return cls(**{name: label(value) for name, value in data.items()}, layers=layers)


def _layer_plan(record: dict[str, Any]) -> LayerPlan:
    """Entries of later releases are left out."""
    found: dict[str, Any] = {"shape": tuple(map(count, checked(record.get("shape"), list)))}
    for name, check in _CHECKS.items():
        if name not in record:
            raise ValueError(f"a layer without {name}")
        found[name] = check(record[name])
    if found["action"] not in ACTIONS:
        raise ValueError(f"action {shown(found['action'])}")
    return LayerPlan(**found)


def _real(value: Any) -> float:
    """A float, infinite too: a loss may be."""
    return float(checked(value, float)) if type(value) is not int else float(count(value))


def _real_or_none(value: Any) -> float | None:
    return None if value is None else _real(value)


_CHECKS: dict[str, Callable[[Any], object]] = {
    **dict.fromkeys(("name", "kind", "action"), text),
    **dict.fromkeys(("amax", "sensitivity", "damping", "input_amax"), _real),
    **dict.fromkeys(("sqnr_db", "change", "loss", "nearest_loss"), _real_or_none),
    "reason": label,
    "scaled": lambda value: checked(value, bool),
    "dead": count,
}
