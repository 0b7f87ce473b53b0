"""Merges separately recorded sessions of one model, and their recorded calls, as if recorded in a single session."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import SessionError, SettingError
from ..files.names import free_name
from .exclusive import alone_if_there
from .session import Session, load_session, save_session
from .states import AUTO, MAX_STATES, Sample
from .states_file import load_states, save_states, states_path


@dataclass(frozen=True)
class Part:
    """One session's contribution: name, model calls, pictures and recorded calls (None: no states file)."""

    name: str
    calls: int
    images: int
    states: int | None


@dataclass(frozen=True)
class Merged:
    """The merged session, not yet saved; ``sample`` is None if no session has recorded calls."""

    session: Session
    sample: Sample | None
    parts: tuple[Part, ...]

    def report(self, name: str) -> str:
        """Summary of the merged session, with a line for each part."""
        states = 0 if self.sample is None else len(self.sample.states)
        lines = [f"{name}: {self.session.summary()}, {states} recorded calls. The sum of:"]
        for part in self.parts:
            kept = "none recorded" if part.states is None else f"{part.states} recorded"
            lines.append(f"  {part.name}: {part.calls} calls ({kept}), {part.images} images")
        return "\n".join(lines)


def merge_files(paths: Sequence[Path]) -> Merged:
    """Add up the sessions at ``paths`` without writing anything. Bit-identical for any order of ``paths``.

    Args:
        paths: two or more ``.pt`` files.

    Raises:
        SettingError: fewer than two.
        SessionError: a session is missing, damaged or of another model, or two contain the same recordings.
    """
    if len(paths) < 2:
        raise SettingError(
            "Merging sessions", got=len(paths), expected="two or more sessions", remedy="Name another one."
        )
    total: Session | None = None
    parts: list[Part] = []
    begun: dict[float, str] = {}
    sample = Sample(MAX_STATES)
    for path in sorted(paths):  # float64 addition is not associative
        with alone_if_there(path):
            session = load_session(path)
            states = _states(path, session)
        _require_apart(session, path, begun)
        parts.append(Part(path.stem, session.calls, session.images, None if states is None else len(states.states)))
        if total is None:
            total = session
        else:
            _add(total, session, path, parts[0].name)
        if states is not None:
            sample.merge(states)
    assert total is not None  # noqa: S101 - two or more
    total.remember()
    kept = [part for part in parts if part.states is not None]
    return Merged(total, _cut(sample, kept) if kept else None, tuple(parts))


def save_merged(merged: Merged, path: Path) -> None:
    """Write the session to ``path`` and its recorded calls beside it: both or neither.

    Raises:
        SettingError: a session or recorded calls of that name exist.
        FileError: the folder cannot be written to.
    """
    states = states_path(path)
    if path.exists() or states.exists():
        raise taken(path)
    if merged.sample is not None:
        save_states(merged.sample, merged.session.fingerprint, states)
    try:
        save_session(merged.session, path)
    except BaseException:  # Ctrl+C too
        states.unlink(missing_ok=True)
        raise


def taken(path: Path) -> SettingError:
    """The error for a session name already in use; suggests a free one."""
    free = free_name(path.stem, lambda name: is_taken(path.parent, name))
    return SettingError(
        f"Session {path.stem}",
        got="a session of that name, which exists",
        expected="the name of a new session",
        remedy=f"Nothing was changed. Choose another name, for example {free}.",
    )


def is_taken(folder: Path, name: str) -> bool:
    """Whether ``folder`` has a session or recorded calls of that name."""
    path = folder / f"{name}.pt"
    return path.exists() or states_path(path).exists()


def equal(a: Session, b: Session) -> bool:
    """Whether two sessions are bit-identical."""

    def numbers(session: Session) -> tuple[object, ...]:
        counts = (session.family, session.fingerprint.layout, session.calls, session.images, session.steps)
        sums = {name: (s.in_calls, s.out_calls, s.out_sum, s.out_sq_sum) for name, s in session.layers.items()}
        return (*counts, session.created, session.updated, sums)

    return numbers(a) == numbers(b) and all(
        torch.equal(stats.abs_sum, b.layers[name].abs_sum) and torch.equal(stats.mean_sum, b.layers[name].mean_sum)
        for name, stats in a.layers.items()
    )


def _states(path: Path, session: Session) -> Sample | None:
    states = states_path(path)
    return load_states(states, session.fingerprint, MAX_STATES) if states.exists() else None


def _require_apart(session: Session, path: Path, begun: dict[float, str]) -> None:
    """Raise SessionError for a copy of an earlier session, or one continued from it: it would count twice."""
    if session.created in begun:
        raise SessionError(
            f"Session {path.stem}",
            got=f"recordings that {begun[session.created]} has too",
            expected="sessions that were recorded apart from each other",
            remedy="Leave one of the two out: what both have would count twice.",
        )
    begun[session.created] = path.stem


def _add(total: Session, session: Session, path: Path, first: str) -> None:
    try:
        total.merge(session)
    except SessionError as error:
        raise SessionError(
            f"Session {path.stem}",
            got=f"another model than that of {first}",
            expected="sessions of one model",
            remedy="Leave it out: what was measured on different models cannot be added up.",
        ) from error


def _cut(sample: Sample, parts: Sequence[Part]) -> Sample:
    """Cut to the size of the largest part, so that the sample stays uniform over all calls.

    If every part kept at least one state per call, nothing is known to be missing, and all may stay.
    """
    sizes = [part.states or 0 for part in parts]
    complete = all(size >= part.calls for size, part in zip(sizes, parts, strict=True))
    cuts = [Sample(max(sizes)), *([Sample(AUTO)] if complete else [])]
    for cut in cuts:
        cut.merge(sample)
    return max(cuts, key=lambda cut: len(cut.states))
