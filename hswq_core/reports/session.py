"""Report on a session: which layers hswq would keep, and whether calibration is sufficient."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from ..calibration.session import Session, load_session
from ..calibration.split import count_prompts
from ..calibration.states import MAX_STATES
from ..calibration.states_file import load_states, states_path
from ..methods.hswq import DEFAULT_KEEP_RATIO
from ..plan.plan import KEEP, QUANTIZE, SKIP
from .convergence import Distance, KeptCalls, Verdict, distances, never_quantized, verdict, would_keep
from .table import Row, markdown

WOULD = {KEEP: "would stay in 16 bits", QUANTIZE: "would go to 8 bits", SKIP: "never quantized"}


@dataclass(frozen=True)
class SessionReport:
    """A session's report.

    Attributes:
        name: name of the session.
        facts: short lines, most important first.
        rows: layers in model order; ``measure`` is the sensitivity, ``action`` what hswq would do at 0.25.
        distances: see ``convergence.distances``.
        statistics: whether the statistics suffice for hswq.
        calls: whether the kept calls suffice for model_aware; None for text encoders, which keep none.
    """

    name: str
    facts: tuple[str, ...]
    rows: tuple[Row, ...]
    distances: tuple[Distance, ...]
    statistics: Verdict
    calls: Verdict | None

    def markdown(self) -> str:
        """Facts and a table of layers, most sensitive first."""
        verdicts = [f"hswq: {self.statistics.text}", *([f"model_aware: {self.calls.text}"] if self.calls else [])]
        columns = ("layer", "kind", f"hswq at {DEFAULT_KEEP_RATIO:g}", "why", "sensitivity", "mean input")
        ranked = sorted(self.rows, key=lambda row: -(row.measure or 0.0))
        cells = [(r.name, r.kind, WOULD[r.action], r.reason, r.measure, r.level) for r in ranked]
        return markdown(self.name, [*verdicts, *self.facts], columns, cells)


def report_session(path: Path) -> SessionReport:
    """Report on a session and the calls kept beside it.

    Raises:
        SessionError: either is damaged, the session is missing, or nothing was recorded.
    """
    session = load_session(path)
    session.require_statistics(f"Session {path.stem}")
    excluded = never_quantized(session)
    history = distances(session, excluded)
    kept = _kept_calls(path, session) if session.images else None  # text encoders generate no images
    rows = _rows(session, excluded)
    return SessionReport(
        path.stem,
        (*_facts(session), *_keep_facts(rows)),
        rows,
        tuple(history),
        verdict(history),
        None if kept is None else kept.verdict(),
    )


def _kept_calls(path: Path, session: Session) -> KeptCalls:
    beside = states_path(path)
    if not beside.exists():
        return KeptCalls(0, 0)
    states = load_states(beside, session.fingerprint, MAX_STATES).states
    return KeptCalls(len(states), count_prompts(states))


def _rows(session: Session, excluded: dict[str, str]) -> tuple[Row, ...]:
    sensitivity = {name: stats.sensitivity for name, stats in session.layers.items()}
    kept = would_keep(sensitivity, excluded)
    rows = []
    for name, stats in session.layers.items():
        action = SKIP if name in excluded else KEEP if name in kept else QUANTIZE
        reason = excluded.get(name, "high sensitivity" if name in kept else "")
        called = stats.level if stats.in_calls else None
        rows.append(Row(name, stats.kind, action, reason, 0, sensitivity[name], level=called))
    return tuple(rows)


def _facts(session: Session) -> list[str]:
    steps = ", ".join(f"{runs} of {steps} steps" for steps, runs in sorted(session.steps.items()))
    days = [_day(seconds) for seconds in (session.created, session.updated)]
    when = days[0] if days[0] == days[1] else f"{days[0]} to {days[1]}"
    return [session.summary(), *([f"runs: {steps}"] if steps else []), f"recorded {when}"]


def _day(seconds: float) -> str:
    try:
        return time.strftime("%Y-%m-%d", time.localtime(seconds))
    except (ValueError, OverflowError, OSError):  # a file may contain any timestamp
        return "at an unknown time"


def _keep_facts(rows: tuple[Row, ...]) -> list[str]:
    counts = {action: sum(row.action == action for row in rows) for action in WOULD}
    return [f"hswq at {DEFAULT_KEEP_RATIO:g}: " + ", ".join(f"{n} {WOULD[action]}" for action, n in counts.items())]
