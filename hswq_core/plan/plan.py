"""The plan: which layers are kept or quantized, why, and with which numbers; raises unless all are accounted for.

As JSON, in files and beside them::

    {"file_format", "method", "budget", "family", "grid", "granularity",
     "layers": [{"name", "kind", "shape", "action", "reason", "scheme", "scaled", "amax", "input_amax",
                 and the measured numbers, see ``NUMBERS``}]}

Readers accept records from any release: unknown fields are dropped, unknown numbers are kept, missing ones are filled
in. ``grid``, ``granularity`` and ``scaled`` follow from the schemes, but release 0.2 requires them.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import LayerError
from ..files.checks import MAX_COUNT, MAX_TEXT, checked, count, label, parse_json, shown, text
from ..quant.grid import FLOAT8_E4M3FN
from ..quant.schemes.fp8 import Fp8, Fp8Cast, Fp8Channel
from ..quant.schemes.scheme import CHANNEL, TENSOR, Scheme
from ..quant.schemes.table import SCHEMES

# Version of the JSON, also written to headers. 1: releases 0.1 and 0.2, without schemes.
PLAN_VERSION = 2
QUANTIZE, KEEP, SKIP = "quantize", "keep", "skip"
ACTIONS = (QUANTIZE, KEEP, SKIP)

SENSITIVITY, SQNR, CHANGE, DAMPING, DEAD = "sensitivity", "sqnr_db", "change", "damping", "dead"
LOSS, NEAREST_LOSS = "loss", "nearest_loss"
# What methods measure per layer -> the recorded value if it was not measured.
#
# sensitivity         output variance (HSWQ)
# sqnr_db             SQNR of the quantized weight in dB; None if not quantized, or if the codes are exact
# change              squared relative change of the model's output with only this layer quantized
# damping             of compensated rounding, relative to the mean diagonal of G; 0 if it was not tried
# dead                input columns that were zero throughout calibration
# loss, nearest_loss  quantized loss of learned rounding and of round to nearest
NUMBERS: dict[str, float | None] = {
    SENSITIVITY: 0.0,
    SQNR: None,
    CHANGE: None,
    DAMPING: 0.0,
    DEAD: 0,
    LOSS: None,
    NEAREST_LOSS: None,
}


@dataclass(frozen=True)
class LayerPlan:
    """The decision about one layer.

    Attributes:
        name: layer name inside the diffusion model.
        kind: a row of the kinds table.
        shape: weight shape.
        action: "quantize"; "keep": in the source's 16-bit precision by choice of the method;
            "skip": not eligible (see ``reason``).
        reason: one phrase.
        scheme: name of its scheme; "" unless quantized.
        amax: clip limit, 0 unless quantized.
        input_amax: clip limit of the inputs if a loader may multiply in 8 bits; else 0.
        numbers: measured values only, see ``NUMBERS``.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    action: str
    reason: str
    scheme: str = ""
    amax: float = 0.0
    input_amax: float = 0.0
    numbers: Mapping[str, float] = field(default_factory=dict)

    @property
    def weights(self) -> int:
        """Number of weight elements."""
        return math.prod(self.shape)

    @property
    def stored(self) -> Scheme | None:
        """The scheme it is stored in; None: not quantized, or a scheme of a later release."""
        return SCHEMES.get(self.scheme)

    @property
    def scaled(self) -> bool:
        """Whether it is quantized with a stored scale."""
        return self.stored is not None and self.stored.scaled

    @property
    def sensitivity(self) -> float:
        """See ``NUMBERS``; 0 if it was not measured."""
        return self.numbers.get(SENSITIVITY, 0.0)

    @property
    def sqnr_db(self) -> float | None:
        """See ``NUMBERS``."""
        return self.numbers.get(SQNR)

    @property
    def change(self) -> float | None:
        """See ``NUMBERS``."""
        return self.numbers.get(CHANGE)

    def measured(self, **numbers: float | None) -> LayerPlan:
        """A copy with more numbers; values equal to the unmeasured default in ``NUMBERS`` are left out."""
        known = {name: value for name, value in numbers.items() if value is not None and value != NUMBERS.get(name)}
        return replace(self, numbers={**self.numbers, **known})

    def to_record(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "name": self.name,
            "kind": self.kind,
            "shape": self.shape,
            "action": self.action,
            "reason": self.reason,
            "scheme": self.scheme,
            "scaled": self.scaled,
            "amax": self.amax,
            "input_amax": self.input_amax,
            **NUMBERS,
            **self.numbers,
        }


@dataclass(frozen=True)
class Plan:
    """The plan of a full conversion.

    Attributes:
        file_format: "v1", "v2" or "comfy".
        method: "hswq", ...
        budget: as it appears in the file name ("0.25"); "" for methods without one.
        family: row of the families table.
        layers: every layer of the model, in model order.
    """

    file_format: str
    method: str
    budget: str
    family: str
    layers: tuple[LayerPlan, ...]

    @property
    def grid(self) -> str:
        """Number formats of the codes."""
        names = {layer.stored.number_format for layer in self.layers if layer.stored is not None}
        return "+".join(sorted(names)) or FLOAT8_E4M3FN.name

    @property
    def schemes(self) -> tuple[str, ...]:
        """Names of the schemes in use."""
        return tuple(sorted({layer.scheme for layer in self.layers if layer.scheme}))

    @property
    def granularity(self) -> str:
        """What one scale covers: "channel" if any layer has per-channel scales, else "tensor"."""
        channel = any(layer.stored is not None and layer.stored.granularity == CHANNEL for layer in self.layers)
        return CHANNEL if channel else TENSOR

    def counts(self) -> dict[str, int]:
        """{"quantize": n, "keep": n, "skip": n}, all three always present."""
        counter = Counter(layer.action for layer in self.layers)
        return {action: counter[action] for action in ACTIONS}

    def by_reason(self, action: str) -> dict[str, int]:
        """Number of layers with ``action``, per reason."""
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
        """JSON text, on one line unless indented; the inverse of ``from_json``."""
        names = ("file_format", "method", "budget", "family", "grid", "granularity")
        record = {name: getattr(self, name) for name in names}
        record["layers"] = [layer.to_record() for layer in self.layers]
        return json.dumps(record, indent=indent, separators=(",", ":") if indent is None else None)

    @classmethod
    def from_json(cls, source: str) -> Plan:
        """Parse ``to_json`` output of this, an earlier or a later release. Raises ValueError on anything else."""
        data = checked(parse_json(source, finite=False), dict)
        granularity = label(data.get("granularity", TENSOR))
        records = [checked(record, dict) for record in checked(data.get("layers"), list)]
        layers = tuple(_layer_plan(record, granularity) for record in records)
        labels = {name: label(data.get(name, "")) for name in ("file_format", "method", "budget", "family")}
        return cls(**labels, layers=layers)


_FIELDS = ("name", "kind", "shape", "action", "reason", "scheme", "scaled", "amax", "input_amax")


def _layer_plan(record: dict[str, Any], granularity: str) -> LayerPlan:
    for name in ("name", "kind", "shape", "action"):
        if name not in record:
            raise ValueError(f"a layer without {name}")
    if record["action"] not in ACTIONS:
        raise ValueError(f"action {shown(record['action'])}")
    plan = LayerPlan(
        name=text(record["name"]),
        kind=text(record["kind"]),
        shape=tuple(map(count, checked(record["shape"], list))),
        action=record["action"],
        reason=label(record.get("reason", "")),
        scheme=label(record.get("scheme", "")) or _scheme_before(record, granularity),
        amax=_real(record.get("amax", 0.0)),
        input_amax=_real(record.get("input_amax", 0.0)),
    )
    return plan.measured(**dict(_measured(record)))


def _scheme_before(record: Mapping[str, Any], granularity: str) -> str:
    """Scheme of a layer from a release that only had FP8."""
    if record["action"] != QUANTIZE:
        return ""
    if not checked(record.get("scaled", False), bool):
        return Fp8Cast.name
    return Fp8Channel.name if granularity == CHANNEL else Fp8.name


def _measured(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers in a record; what a later release says beside them may be anything, and only numbers are kept."""
    for name, value in record.items():
        if name in NUMBERS and value is not None:
            yield name, _real(value)
        elif name not in (*_FIELDS, *NUMBERS) and _is_number(name, value):
            yield name, value


def _is_number(name: str, value: Any) -> bool:
    named = name.isprintable() and 0 < len(name) <= MAX_TEXT
    return named and (type(value) is float or (type(value) is int and abs(value) <= MAX_COUNT))


def _real(value: Any) -> float:
    """A float, possibly infinite, as a loss may be."""
    return float(checked(value, float)) if type(value) is not int else count(value)
