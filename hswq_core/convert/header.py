"""Metadata of a converted file: ``hswq`` and ``hswq_plan``, JSON in the safetensors header."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch

from ..calibration.session import Session
from ..devices import CPU
from ..errors import FileError, LayerError
from ..files.checkpoint import TensorSource, source_hash
from ..files.checks import checked, parse_json, shown
from ..plan.formats import FORMATS, format_named
from ..plan.plan import KEEP, PLAN_VERSION, LayerPlan, Plan

HEADER_KEY, PLAN_KEY = "hswq", "hswq_plan"
HEADER_VERSION = 1


def made_with(device: torch.device) -> dict[str, str]:
    """The environment a file's bytes depend on: summation order differs between machines.

    On one machine the same session, model and settings give the same bytes.

    Args:
        device: device used for planning.
    """
    where = device.type
    if device.type == "cpu":
        where = f"CPU, {torch.get_num_threads()} threads"
    elif device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    return {"torch": torch.__version__, "device": where}


def header_metadata(
    source: TensorSource, plan: Plan, session: Session | None, device: torch.device = CPU
) -> dict[str, str]:
    """The source's metadata plus ``hswq`` and the full ``hswq_plan``: deterministic JSON (no timestamps).

    Args:
        source: source of the tensors.
        plan: what is done to them.
        session: the calibration session used; None, and ``null`` in the file, if the method needs none.
        device: see ``made_with``.
    """
    record = {
        "version": HEADER_VERSION,
        "format": plan.file_format,
        "method": plan.method,
        "budget": plan.budget,
        "grid": plan.grid,
        "family": plan.family,
        "session": session and _session(session),
        "source": {"name": source.name, "sha256_of_header": source_hash(source)},
        "counts": plan.counts(),
        "made_with": made_with(device),
        "plan": PLAN_VERSION,
        "schemes": plan.schemes,
        "comfyui": format_named(plan.file_format).stock_since(plan.schemes),
        "kept": {layer.name: layer.reason for layer in plan.layers if layer.action == KEEP},
    }
    text = json.dumps(record, separators=(",", ":"), sort_keys=True)
    return {**source.metadata, HEADER_KEY: text, PLAN_KEY: plan.to_json()}


def _session(session: Session) -> dict[str, object]:
    return {"fingerprint": session.fingerprint.layout, "calls": session.calls, "images": session.images}


def declared_format(metadata: Mapping[str, str] | None, file_name: str) -> str | None:
    """Format (a key of ``FORMATS``) declared by a file's metadata; None without an ``hswq`` entry.

    Raises:
        FileError: the entry is damaged, or has a version or format unknown to this release.
    """
    text = (metadata or {}).get(HEADER_KEY)
    if text is None:
        return None
    record = header_record(text, file_name)
    version, name = record["version"], record["format"]
    if version != HEADER_VERSION:
        raise _bad(file_name, f"version {shown(version)}", f"version {HEADER_VERSION}", "Update this node pack.")
    if not isinstance(name, str) or name not in FORMATS:
        raise _bad(file_name, f"format {shown(name)}", " or ".join(FORMATS), "Update this node pack.")
    return name


def header_record(text: str, file_name: str) -> dict[str, Any]:
    """The parsed ``hswq`` entry, with at least version and format; FileError if it is damaged."""
    try:
        record = checked(parse_json(text), dict)
    except ValueError as error:
        raise _bad(file_name, f"unreadable ({error})", "JSON with version and format") from error
    if not {"version", "format"} <= set(record):
        raise _bad(file_name, "unreadable (no version or no format)", "JSON with version and format")
    return record


def declared_plan(metadata: Mapping[str, str], file_name: str) -> Plan | None:
    """The plan a file was written with; None if it has none.

    Raises:
        FileError: it is damaged, or has numbers that no conversion produces.
    """
    text = metadata.get(PLAN_KEY)
    if text is None:
        return None
    try:
        plan = Plan.from_json(text)
        for layer in plan.layers:
            _require_sound(layer)
        plan.require_closed(len(plan.layers))
    except (ValueError, LayerError) as error:
        raise FileError(
            f"File {file_name}, plan",
            got=f"unreadable ({error})",
            expected=f"a plan as the Converter writes it, of version {PLAN_VERSION} or before",
            remedy=_plan_remedy(metadata, file_name),
        ) from error
    return plan


def _plan_remedy(metadata: Mapping[str, str], file_name: str) -> str:
    """Advice for an unreadable plan, which a later release may have written."""
    damaged = "The file is damaged: convert or download it again."
    try:
        said = header_record(metadata[HEADER_KEY], file_name).get("plan")
    except (KeyError, FileError):
        return damaged
    if type(said) is int and said > PLAN_VERSION:
        return f"It was written by a later release, plan version {shown(said)}: update this node pack."
    return damaged


def _require_sound(layer: LayerPlan) -> None:
    """Raise ValueError for values that no conversion produces; files are untrusted."""
    numbers = (layer.amax, layer.sensitivity, layer.change or 0.0, layer.input_amax)
    if not layer.shape or min(layer.shape) < 1:
        raise ValueError(f"layer {layer.name} of shape {layer.shape}")
    if not all(math.isfinite(n) for n in (*numbers, layer.sqnr_db or 0.0)) or min(numbers) < 0:
        raise ValueError(f"layer {layer.name} with the numbers {numbers}, {layer.sqnr_db}")


def _bad(
    file_name: str, got: str, expected: str, remedy: str = "The file is damaged: convert or download it again."
) -> FileError:
    return FileError(f"File {file_name}, header entry {HEADER_KEY}", got=got, expected=expected, remedy=remedy)
