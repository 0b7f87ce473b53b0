"""A forked child does real work and is killed, at a random moment or just as it writes.

The parent has loaded ComfyUI and the model, so that a child starts working at once. The parent must not have started a
thread pool: OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

POLL_SECONDS = 0.0003
# After a temporary file appears: small ones are written and synced in about this time.
BEHIND_A_WRITE = 0.004


@dataclass(frozen=True)
class Moment:
    """When to kill.

    Attributes:
        seconds: after the start, or after the temporary file appears.
        write: which temporary file to wait for, from 1; 0: none.
    """

    seconds: float
    write: int = 0

    @classmethod
    def drawn(cls, rng: random.Random, duration: float, writes: int) -> Moment:
        """Draw a moment: uniform over a run's duration or, every second time, around one of its writes."""
        if rng.random() < 0.5:
            return cls(rng.uniform(0, duration))
        return cls(rng.uniform(0, BEHIND_A_WRITE), rng.randint(1, writes))


@dataclass(frozen=True)
class End:
    """What became of a child.

    Attributes:
        status: "killed", "done", or the error that ended it.
        seconds: how long it lived.
    """

    status: str
    seconds: float


def temporary_files(folders: Iterable[Path]) -> set[Path]:
    """Every temporary file and folder of ours below ``folders``."""
    found = set()
    for folder in folders:
        for root, names, files in os.walk(folder):
            parts = [*(name for name in files if name.endswith(".tmp") or name.startswith(".hswq"))]
            parts += [name for name in names if name.startswith(".hswq-")]
            found |= {Path(root, name) for name in parts}
    return found


def half_written(folders: Iterable[Path]) -> set[Path]:
    """The files among these."""
    return {path for path in temporary_files(folders) if path.name.endswith(".hswq.tmp")}


def run(work: Callable[[], object], log: Path, moment: Moment | None = None, folders: Iterable[Path] = ()) -> End:
    """Do ``work`` in a child, and kill it at ``moment``.

    Args:
        work: what to do.
        log: receives what the child prints.
        moment: None: never.
        folders: where the child writes.
    """
    began = time.perf_counter()
    child = os.fork()
    if child == 0:
        _child(work, log)
    if moment is not None and _reached(child, moment, began, list(folders)):
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    seconds = time.perf_counter() - began
    if status == -signal.SIGKILL:
        return End("killed", seconds)
    return End("done" if status == 0 else f"exit {status}: {_last_lines(log)}", seconds)


def _child(work: Callable[[], object], log: Path) -> None:
    """Never returns, and skips the parent's exit handlers."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(handle, stream)
    code = 1
    try:
        with torch.inference_mode():
            work()
        code = 0
    except BaseException:  # noqa: BLE001 - the parent reports it
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _reached(child: int, moment: Moment, began: float, folders: list[Path]) -> bool:
    """Wait for the moment; False if the child ended first."""
    seen, old = set[Path](), temporary_files(folders)
    while moment.write and len(seen) < moment.write:
        if _ended(child):
            return False
        seen |= half_written(folders) - old  # no pause: some exist for only a millisecond
    until = (time.perf_counter() if moment.write else began) + moment.seconds
    while time.perf_counter() < until:
        time.sleep(POLL_SECONDS)
    return not _ended(child)


def _ended(child: int) -> bool:
    """Whether the child has ended, without reaping its status."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _last_lines(log: Path) -> str:
    return " | ".join(log.read_text(errors="replace").strip().splitlines()[-3:])
