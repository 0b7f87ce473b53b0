"""``merge``: sessions of one model, recorded on several machines, as if one had recorded them all."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from ..errors import SettingError
from ..session import Session, load_session, save_session
from ..states import MAX_STATES, Sample, load_states, save_states, states_path

log = logging.getLogger("hswq")


def merge(options: argparse.Namespace) -> bool:
    """Write the sum; the recorded calls of ``model_aware`` too, where sessions have them."""
    output: Path = options.output
    if len(options.sessions) < 2 or output.suffix != ".pt" or output.exists():
        raise SettingError(
            "merge",
            got=f"{len(options.sessions)} sessions into {output}" + (", which exists" if output.exists() else ""),
            expected="two or more sessions and the name of a new .pt",
            remedy="Choose another name with --output.",
        )
    merged = load_session(options.sessions[0])
    for path in options.sessions[1:]:
        merged.merge(load_session(path))
    _merge_states(options.sessions, merged, output)
    save_session(merged, output)
    log.info("%s: %s", output, merged.summary())
    return True


def _merge_states(sessions: list[Path], merged: Session, output: Path) -> None:
    files = [states_path(path) for path in sessions if states_path(path).exists()]
    if not files:
        return
    parts = [load_states(file, merged.fingerprint, MAX_STATES) for file in files]
    sample = Sample(max(len(part.states) for part in parts))  # as many as one of them: a uniform sample of all calls
    for part in parts:
        sample.merge(part)
    save_states(sample, merged.fingerprint, states_path(output))
    log.info("%s: %d recorded calls of %d sessions", states_path(output).name, len(sample.states), len(files))
