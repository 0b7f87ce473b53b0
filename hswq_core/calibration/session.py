"""A calibration session: statistics summed over runs; saving, loading, merging.

File: ``torch.save`` of plain containers and tensors, read by ``files.pt.reader`` (or ``weights_only=True``)::

    {"type": "hswq_session", "version": 1,
     "meta": {"family", "layout", "weights" float32 [n·4], "calls", "images", "steps" {steps: runs},
              "created", "updated", "history" (optional, see ``history``)},
     "layers": {name: {"kind", "shape", "in_calls", "out_calls", "out_sum", "out_sq_sum",
                       "abs_sum" float64 [C_in], "mean_sum" float64 [C_in], "input_amax"}}}
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..errors import SessionError
from ..files.atomic import save_pt
from ..files.checks import checked, count, number, shown, text
from ..files.pt.reader import read_containers
from ..model.fingerprint import SAMPLES_PER_LAYER, Fingerprint, layout_hash
from ..model.kinds import KINDS
from .history import History, from_record, joined, point_of, to_record
from .observer import LayerStats

SESSION_TYPE = "hswq_session"
SESSION_VERSION = 1
MAX_LAYERS = 10_000
MAX_CHANNELS = 1_000_000
RECALIBRATE = "Calibrate again under a new session name."


@dataclass
class Session:
    """Statistics of one model.

    Attributes:
        family: row of the families table.
        fingerprint: identifies the model, see ``Fingerprint``.
        layers: one entry for every Linear and Conv2d of the model, including those never called.
        calls: completed forwards of the diffusion model.
        images: number of pictures whose sampling started.
        steps: sampler steps -> number of sampling runs with that many steps.
        created, updated: seconds since the epoch.
        history: snapshots at earlier saves.
    """

    family: str
    fingerprint: Fingerprint
    layers: dict[str, LayerStats]
    calls: int = 0
    images: int = 0
    steps: dict[int, int] = field(default_factory=dict)
    created: float = field(default_factory=time.time)
    updated: float = field(default_factory=time.time)
    history: History = ()

    def merge(self, other: Session) -> None:
        """Add ``other`` (same model): two half sessions give the full one, up to float64 addition.

        Raises:
            SessionError: ``other`` is of another model.
        """
        self.fingerprint.require_same(other.fingerprint, "Merging sessions")
        for name, stats in other.layers.items():
            self.layers[name].merge(stats)
        self.calls += other.calls
        self.images += other.images
        for steps, runs in other.steps.items():
            self.steps[steps] = self.steps.get(steps, 0) + runs
        self.created = min(self.created, other.created)
        self.updated = max(self.updated, other.updated)
        self.history = joined(self.history, other.history)

    def remember(self) -> None:
        """Add a snapshot of the current statistics to the history."""
        self.history = joined(self.history, [point_of(self.layers, self.calls, self.images)])

    def require_statistics(self, what: str) -> None:
        """Raise SessionError if nothing was recorded."""
        if self.calls == 0:
            raise SessionError(
                what,
                got="a session with no completed model call",
                expected="at least one",
                remedy="Queue the workflow with the Calibration node between model loader and sampler, then convert.",
            )

    def summary(self) -> str:
        """One line for reports."""
        return f"{self.family}, {len(self.layers)} layers, {self.calls} calls, {self.images} images"


def save_session(session: Session, path: Path) -> None:
    """Write atomically. Raises FileError if the folder cannot be written to."""
    meta = {
        "family": session.family,
        "layout": session.fingerprint.layout,
        "weights": session.fingerprint.weights,
        "calls": session.calls,
        "images": session.images,
        "steps": dict(session.steps),
        "created": session.created,
        "updated": session.updated,
        **({"history": to_record(session.history)} if session.history else {}),
    }
    layers = _layer_records(session.layers)
    save_pt({"type": SESSION_TYPE, "version": SESSION_VERSION, "meta": meta, "layers": layers}, path)


def read_pt(path: Path) -> dict[str, Any]:
    """A ``.pt`` as plain containers, without executing a pickle; values are not validated yet.

    Raises:
        SessionError: no such file, or not just plain containers and tensors, see ``read_containers``.
    """
    if not path.is_file():
        raise SessionError(
            f"Session file {path.name}",
            got="no such file",
            expected=f"statistics in {path.parent}",
            remedy="Check the session name, or queue a workflow with the Calibration node first, switched on and not "
            "bypassed.",
        )
    try:
        data = read_containers(path)
    except (ValueError, OSError) as error:
        raise SessionError(
            f"Session file {path.name}",
            got=f"an unreadable file ({error})",
            expected="a file saved by the Calibration node",
            remedy=RECALIBRATE,
        ) from error
    if not isinstance(data, dict):
        raise damaged(path, f"a {type(data).__name__}")
    return data


def load_session(path: Path) -> Session:
    """Read and validate a session.

    Raises:
        SessionError: missing, unreadable, of another version, or malformed.
    """
    return parse_session(read_pt(path), path)


def parse_session(data: dict[str, Any], path: Path) -> Session:
    """The session in ``data``, as read by ``read_pt`` from ``path`` (named in errors); see ``load_session``."""
    if data.get("type") != SESSION_TYPE:
        raise damaged(path, f"type {shown(data.get('type'))}")
    if data.get("version") != SESSION_VERSION:
        raise SessionError(
            f"Session file {path.name}, version",
            got=shown(data.get("version")),
            expected=SESSION_VERSION,
            remedy="It was written by another release of this pack: update the pack, or calibrate again.",
        )
    try:
        return _session(checked(data.get("meta"), dict), checked(data.get("layers"), dict))
    except KeyError as error:
        raise damaged(path, f"no {error}") from error
    except ValueError as error:
        raise damaged(path, str(error)) from error


def damaged(path: Path, got: str) -> SessionError:
    """The error for a session file with invalid content."""
    return SessionError(
        f"Session file {path.name}", got=got, expected="a session saved by the Calibration node", remedy=RECALIBRATE
    )


def _session(meta: dict[str, Any], records: dict[str, Any]) -> Session:
    if not 0 < len(records) <= MAX_LAYERS:
        raise ValueError(f"{len(records)} layers")
    layers = {text(name): _layer_stats(text(name), checked(record, dict)) for name, record in records.items()}
    layout = layout_hash({name: (stats.kind, stats.shape) for name, stats in layers.items()})
    if layout != meta["layout"]:
        raise ValueError("layers that do not match its fingerprint")
    weights = checked(meta["weights"], torch.Tensor).to(torch.float32)
    if weights.shape != (len(layers) * SAMPLES_PER_LAYER,) or not bool(weights.isfinite().all()):
        raise ValueError("missing or non-finite weights in its fingerprint")
    return Session(
        family=text(meta["family"]),
        fingerprint=Fingerprint(layout, weights),
        layers=layers,
        calls=count(meta["calls"]),
        images=count(meta["images"]),
        steps={count(steps): count(runs) for steps, runs in checked(meta["steps"], dict).items()},
        created=number(meta["created"]),
        updated=number(meta["updated"]),
        history=from_record(meta.get("history"), len(layers), count(meta["calls"])),
    )


def _layer_records(layers: dict[str, LayerStats]) -> dict[str, dict[str, Any]]:
    records = {name: {**vars(stats), "shape": list(stats.shape)} for name, stats in layers.items()}
    # Views of one tensor, which the file holds once: half the time to write and read of two tensors per layer.
    vectors = [record[key] for record in records.values() for key in ("abs_sum", "mean_sum")]
    parts = iter(torch.cat(vectors).split([len(vector) for vector in vectors]))
    for record in records.values():
        record["abs_sum"], record["mean_sum"] = next(parts), next(parts)
    return records


def _layer_stats(name: str, record: dict[str, Any]) -> LayerStats:
    kind, shape = text(record["kind"]), tuple(count(n) for n in checked(record["shape"], list))
    vectors = {key: checked(record[key], torch.Tensor).to(torch.float64) for key in ("abs_sum", "mean_sum")}
    channels = vectors["abs_sum"].numel()
    row = KINDS.get(kind)
    if row is None or len(shape) != row.rank or min(shape) < 1 or not 0 < channels <= MAX_CHANNELS:
        raise ValueError(f"layer {name}: {kind} of shape {shape} with {channels} channels")
    groups, rest = divmod(channels, shape[1])
    if rest or (groups != 1 and not row.grouped) or any(v.shape != (channels,) for v in vectors.values()):
        raise ValueError(f"layer {name}: {channels} channels for a {kind} weight of shape {shape}")
    stats = LayerStats(
        kind=kind,
        shape=shape,
        in_calls=count(record["in_calls"]),
        out_calls=count(record["out_calls"]),
        out_sum=number(record["out_sum"]),
        out_sq_sum=number(record["out_sq_sum"]),
        abs_sum=vectors["abs_sum"],
        mean_sum=vectors["mean_sum"],
        input_amax=number(record["input_amax"]),
    )
    require_sound(stats)
    return stats


def require_sound(stats: LayerStats) -> None:
    """Raise ValueError for sums that no calibration can produce."""
    if not stats.is_finite():
        raise ValueError("non-finite sums")
    numbers = (stats.in_calls, stats.out_calls, stats.out_sq_sum, stats.input_amax)
    if min(numbers) < 0 or bool((stats.abs_sum < 0).any()):
        raise ValueError("negative counts or sums")
