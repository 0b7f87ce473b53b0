"""``inspect``, ``compare`` and ``verify``: file contents as tables or JSON on stdout."""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from ..calibration.session import Session, load_session
from ..convert.header import declared_plan
from ..errors import FileError
from ..files.checkpoint import read_header
from ..reports.inspect import QuantizedFile, findings
from ..reports.inspect import compare as differences

log = logging.getLogger("hswq")

Row = dict[str, Any]


def inspect(options: argparse.Namespace) -> bool:
    """Show the layers of a session or file; for a file from its plan, or its tensors if it has none."""
    path: Path = options.file
    if path.suffix == ".pt":
        session = load_session(path)
        _show(session.summary(), _session_rows(session), as_json=options.json)
    else:
        summary, rows = _file_rows(path)
        _show(summary, rows, as_json=options.json)
    return True


def compare(options: argparse.Namespace) -> bool:
    """Show the SQNR of each weight, worst first; True if all shapes match."""
    weights = list(differences(QuantizedFile(options.original), QuantizedFile(options.converted)))
    weights.sort(key=lambda d: -math.inf if d.sqnr_db is None else d.sqnr_db)
    rows = [
        {
            "weight": d.key,
            "was": _name(d.dtypes[0]),
            "is": _name(d.dtypes[1]),
            "SQNR, dB": "another shape" if d.sqnr_db is None else d.sqnr_db,
        }
        for d in weights
    ]
    same_shape = [d.sqnr_db for d in weights if d.sqnr_db is not None]
    changed = [sqnr for sqnr in same_shape if sqnr != math.inf]
    summary = f"{len(weights)} weights, {len(same_shape) - len(changed)} equal"
    if len(same_shape) < len(weights):
        summary += f", {len(weights) - len(same_shape)} of another shape"
    if changed:
        summary += f", mean SQNR of those that changed {sum(changed) / len(changed):.1f} dB"
    _show(summary, rows, as_json=options.json)
    return len(same_shape) == len(weights)


def verify(options: argparse.Namespace) -> bool:
    """Log the problems of each file; True if there are none."""
    sound = True
    for path in chain.from_iterable(options.files):
        try:
            problems = list(findings(path))
        except FileError as error:
            problems = [str(error)]
        for line in problems:
            log.error("%s: %s", path.name, line)
        if not problems:
            log.info("%s: sound", path.name)
        sound = sound and not problems
    return sound


def _session_rows(session: Session) -> list[Row]:
    return [
        {
            "layer": name,
            "kind": stats.kind,
            "shape": "x".join(map(str, stats.shape)),
            "calls": stats.in_calls,
            "sensitivity": stats.sensitivity,
            "mean |input|": stats.level if stats.in_calls else None,
            "largest input": stats.input_amax,
        }
        for name, stats in session.layers.items()
    ]


def _file_rows(path: Path) -> tuple[str, list[Row]]:
    metadata, entries = read_header(path)
    size = sum(info.nbytes for info in entries.values())
    summary = f"{path.name}: {len(entries)} tensors, {size:,} bytes"
    plan = declared_plan(metadata, path.name)
    if plan is not None:
        summary += f"; format {plan.file_format}, method {plan.method}, budget {plan.budget}, family {plan.family}"
        summary += f"; {plan.counts()}"
        columns = ("name", "kind", "action", "reason", "amax", "sqnr_db", "change")
        return summary, [{column: getattr(layer, column) for column in columns} for layer in plan.layers]
    return summary, [
        {"tensor": key, "dtype": _name(info.dtype), "shape": "x".join(map(str, info.shape)), "bytes": info.nbytes}
        for key, info in entries.items()
    ]


def _name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def _show(summary: str, rows: Sequence[Row], *, as_json: bool) -> None:
    """Print to stdout, which carries only results; everything else goes to stderr."""
    if as_json:
        safe = [{key: None if value == math.inf else value for key, value in row.items()} for row in rows]
        sys.stdout.write(json.dumps({"summary": summary, "rows": safe}, indent=1) + "\n")
        return
    lines = [[str(key) for key in rows[0]], *([_cell(value) for value in row.values()] for row in rows)] if rows else []
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        sys.stdout.write("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() + "\n")
    sys.stdout.write(f"{summary}\n")


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else str(value)
