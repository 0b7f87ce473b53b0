"""Imports statistics files of the ComfyUI port that preceded this pack.

Their layout: ``meta.type == "hswq_dual_monitor_v2"``, ``layers[name] = {output_sum, output_sq_sum, out_count,
input_imp_sum (float64 [C_in]), in_count}``. They lack weights, input means and maxima, so names,
shapes and fingerprint come from the model they are imported for.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import SessionError
from ..files.checkpoint import PREFIXES
from ..files.checks import checked, count, number, text
from ..model.fingerprint import Fingerprint
from .observer import LayerStats
from .session import Session, damaged, read_pt, require_sound

PREDECESSOR_TYPE = "hswq_dual_monitor_v2"


def is_predecessor(data: Mapping[str, Any]) -> bool:
    """Whether ``data``, as read by ``read_pt``, is one of their files."""
    meta = data.get("meta")
    return isinstance(meta, dict) and meta.get("type") == PREDECESSOR_TYPE


def import_predecessor(path: Path, layers: Mapping[str, LayerStats], fingerprint: Fingerprint, family: str) -> Session:
    """Convert their file to a session.

    Args:
        path: their ``.pt``.
        layers: empty statistics for every Linear and Conv2d of the target model.
        fingerprint: of that model.
        family: of that model.

    Raises:
        SessionError: not such a file, a layer that only one side has, or a vector of the wrong length.
    """
    data = read_pt(path)
    if not is_predecessor(data):
        raise damaged(path, "no file of the predecessor")
    try:
        records = {_strip(text(name)): record for name, record in checked(data.get("layers"), dict).items()}
    except ValueError as error:
        raise damaged(path, f"layers: {error}") from error
    unknown = sorted(set(records) - set(layers))
    if unknown:
        raise SessionError(
            f"Session file {path.name}, layer {unknown[0]}",
            got="a layer this model does not have",
            expected=f"only layers of the connected model ({len(unknown)} others are unknown too)",
            remedy="Connect the model these statistics were made with.",
        )
    missing = sorted(set(layers) - set(records))
    if missing:
        raise SessionError(
            f"Session file {path.name}, layer {missing[0]}",
            got=f"no statistics for it and {len(missing) - 1} other layers",
            expected="statistics of every Linear and Conv2d of the connected model",
            remedy="Calibrate with this pack's Calibration node, which observes every layer.",
        )
    merged = {name: _stats(path, name, records[name], like) for name, like in layers.items()}
    calls = max((stats.out_calls for stats in merged.values()), default=0)
    return Session(family, fingerprint, merged, calls=calls)


def _strip(name: str) -> str:
    prefix = next((p for p in PREFIXES if name.startswith(p)), "")
    return name[len(prefix) :]


def _stats(path: Path, name: str, record: object, like: LayerStats) -> LayerStats:
    try:
        return _checked_stats(checked(record, dict), like)
    except KeyError as error:
        raise damaged(path, f"layer {name}: no {error}") from error
    except ValueError as error:
        raise damaged(path, f"layer {name}: {error}") from error


def _checked_stats(record: Mapping[str, Any], like: LayerStats) -> LayerStats:
    importance = checked(record["input_imp_sum"], torch.Tensor)
    if importance.shape != like.abs_sum.shape:
        raise ValueError(f"importance of shape {tuple(importance.shape)}, the model's is {tuple(like.abs_sum.shape)}")
    importance = importance.to(torch.float64)
    stats = LayerStats(
        kind=like.kind,
        shape=like.shape,
        in_calls=count(record["in_count"]),
        out_calls=count(record["out_count"]),
        out_sum=number(record["output_sum"]),
        out_sq_sum=number(record["output_sq_sum"]),
        abs_sum=importance,
        mean_sum=torch.zeros_like(importance),
        input_amax=0.0,
    )
    require_sound(stats)
    return stats
