"""States on disk: a safetensors file beside the session.

Tensors ``<i>/<argument>`` (list items ``<i>/<argument>/<n>``); metadata ``hswq_states``: JSON {"version", "layout",
"states": [{"key", "constants", "same"}]}. Calls for one prompt share their conditioning, which is larger than their
latents: equal tensors are stored once, and "same" maps to them, {argument: tensor name}.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import FileError, SessionError
from ..files.atomic import save_tensors
from ..files.checkpoint import FileSource, read_header
from ..files.checks import checked, number, parse_json, shown
from ..model.fingerprint import Fingerprint
from .state_checks import require_arguments, require_call
from .states import MAX_BYTES, MAX_STATES, SCHEDULE, Sample, State

HEADER_KEY, VERSION = "hswq_states", 1
STATES_SUFFIX = ".states.safetensors"


def states_path(session: Path) -> Path:
    """Path of a session's recorded calls, beside its file."""
    return session.with_suffix(STATES_SUFFIX)


def save_states(sample: Sample, fingerprint: Fingerprint, path: Path) -> None:
    """Write atomically. Raises FileError if the folder cannot be written to."""
    tensors: dict[str, torch.Tensor] = {}
    entries, stored = [], dict[int, str]()
    for i, state in enumerate(sample.states):
        same: dict[str, str] = {}
        for name, tensor in state.tensors.items():
            if id(tensor) in stored:
                same[name] = stored[id(tensor)]
            else:
                stored[id(tensor)] = f"{i}/{name}"
                tensors[f"{i}/{name}"] = tensor
        entries.append({"key": state.key, "constants": state.constants, "same": same})
    header = {"version": VERSION, "layout": fingerprint.layout, "states": entries}
    save_tensors(tensors, path, {HEADER_KEY: json.dumps(header)})


def load_states(path: Path, fingerprint: Fingerprint, capacity: int) -> Sample:
    """The states at ``path``.

    Raises:
        SessionError: missing, damaged, of a newer version, or of another model.
    """
    if not path.is_file():
        raise SessionError(
            f"States {path.name}",
            got="no such file",
            expected="model calls recorded by the Calibration node",
            remedy="Set the Calibration node's states above 0 and generate once more, or choose method hswq.",
        )
    try:
        source = FileSource(path)
        header = checked(parse_json(source.metadata[HEADER_KEY]), dict)
        sample = _parsed(header, source, capacity)
    except (FileError, OSError, KeyError, ValueError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from error
    if header["layout"] != fingerprint.layout:
        raise SessionError(
            f"States {path.name}",
            got="model calls of another model",
            expected=f"those of the model the session was made with ({fingerprint.short})",
            remedy="Use another session name for this model.",
        )
    return sample


def count_states(path: Path) -> int:
    """Number of states at ``path``, from the header alone.

    Raises:
        SessionError: missing or damaged.
    """
    try:
        header = checked(parse_json(read_header(path)[0][HEADER_KEY]), dict)
        return len(checked(header["states"], list))
    except (FileError, OSError, KeyError, ValueError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from error


def _parsed(header: dict[str, Any], source: FileSource, capacity: int) -> Sample:
    if header["version"] != VERSION:
        raise ValueError(f"version {shown(header['version'])}, this release reads {VERSION}")
    entries = [checked(entry, dict) for entry in checked(header["states"], list)]
    size = sum(info.nbytes for info in source.entries.values())
    if len(entries) > MAX_STATES or size > (MAX_BYTES if len(entries) > 1 else 2 * MAX_BYTES):
        raise ValueError(f"{len(entries)} states of {size:,} bytes, expected at most {MAX_STATES} of {MAX_BYTES:,}")
    checked(header["layout"], str)
    tensors = {key: source.read(key) for key in source.entries}
    parts: list[dict[str, torch.Tensor]] = [{} for _ in entries]
    for key, tensor in tensors.items():
        state, _, name = key.partition("/")
        if not state.isdecimal() or int(state) >= len(parts):
            raise ValueError(f"tensor {key!r} of no state")
        parts[int(state)][name] = tensor
    sample = Sample(capacity)
    sample.add([_state(entry, part, tensors) for entry, part in zip(entries, parts, strict=True)])
    return sample


def _state(entry: dict[str, Any], part: dict[str, torch.Tensor], tensors: Mapping[str, torch.Tensor]) -> State:
    constants, same = checked(entry["constants"], dict), checked(entry.get("same", {}), dict)
    part |= {name: tensors[checked(key, str)] for name, key in same.items()}
    require_arguments(part, constants)
    require_call(part, part.get(SCHEDULE))
    key = number(entry["key"])
    if not 0 <= key <= 1:
        raise ValueError(f"key {key}, expected 0 to 1")
    return State(key, part, constants)


def _damaged(path: Path, what: str) -> SessionError:
    return SessionError(
        f"States {path.name}",
        got=f"an unreadable file ({what})",
        expected="model calls recorded by the Calibration node",
        remedy=f"Delete {path.name} and generate once more with the Calibration node.",
    )
