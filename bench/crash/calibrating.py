"""Kill a calibration, check the session, and continue the same session."""

from __future__ import annotations

import mmap
import random
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rig.inprocess import sample

from crash.killing import Moment, half_written, run, temporary_files
from crash.tally import Tally

CALIBRATING = "calibrating"
SAVE_EVERY, STATES, STEPS, RUNS = 2, 8, 6, 2
WRITES = RUNS * (STEPS // SAVE_EVERY + 1)
# Kills before a new session is started, so that first saves are hit too.
KILLS_A_SESSION = 10


class Calibrating:
    """The Calibration node's real execute, ComfyUI's real sampling.

    Args:
        model: a ModelPatcher.
        folder: ComfyUI's output folder.
    """

    def __init__(self, model: Any, folder: Path) -> None:
        from hswq.loader.model import inspect_model

        self.model, self.folder, self.log = model, folder, folder.parent / "child.log"
        self.info = inspect_model(model)
        self.calls = mmap.mmap(-1, 8)  # shared with the child: model calls that it has completed

    def work(self, session: str, seed: int) -> None:
        """Draw ``RUNS`` pictures."""
        from comfy.patcher_extension import WrappersMP
        from hswq.nodes.calibration import HSWQCalibration

        node = HSWQCalibration.PREPARE_CLASS_CLONE(None)
        watched = node.execute(self.model, session, SAVE_EVERY, STATES, 1).args[0].clone()
        watched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "count", self._count)  # within the node's own wrapper
        for number in range(RUNS):
            sample(watched, steps=STEPS, cfg=1.0, seed=seed + number, prompt=seed + number)

    def killed(self, kills: int, rng: random.Random) -> Tally:
        """Kill ``kills`` processes."""
        tally = Tally(CALIBRATING, lost_bound=SAVE_EVERY)
        tally.seconds = min(run(lambda: self.work("undisturbed", 0), self.log).seconds for _ in range(2))
        seed = 0
        while tally.kills < kills:
            session, seed = f"crash_{tally.kills // KILLS_A_SESSION}", seed + RUNS
            before, old = self._saved(session), temporary_files([self.folder])
            self.calls[:] = bytes(8)
            moment = Moment.drawn(rng, tally.seconds, WRITES)
            end = run(lambda name=session, first=seed: self.work(name, first), self.log, moment, [self.folder])
            self._judge(tally, end.status, session, before, old)
        return tally

    def _judge(self, tally: Tally, status: str, session: str, before: int, old: set[Path]) -> None:
        now = temporary_files([self.folder])
        tally.kills += status == "killed"
        tally.in_writes += status == "killed" and bool(half_written([self.folder]) - old)
        tally.finished += status == "done"
        if status not in ("killed", "done"):
            tally.damage.append(f"{session}: {status}")
        tally.damage += [f"{session}: {line}" for line in self.findings(session)]
        done, saved = struct.unpack("Q", self.calls[:])[0], self._saved(session)
        tally.files += saved > 0
        if not before <= saved <= before + done:
            tally.damage.append(f"{session}: {saved} calls saved, {before} before and {done} made since")
        tally.lost = max(tally.lost, before + done - saved)
        if saved > before:  # it has saved since: earlier leftovers must be gone
            tally.left += len(now & old)
            tally.resumed += before > 0

    def findings(self, session: str) -> Iterator[str]:
        """Problems in a session's files, one line each."""
        from hswq.hswq_core.calibration.session import load_session
        from hswq.hswq_core.calibration.states import MAX_STATES
        from hswq.hswq_core.calibration.states_file import load_states, states_path
        from hswq.hswq_core.errors import HSWQError
        from hswq.loader.sessions.store import path_of

        path = path_of(session)
        if not path.exists():
            if states_path(path).exists():
                yield "states without a session"
            return
        try:
            found = load_session(path)
            found.fingerprint.require_same(self.info.fingerprint, "Session")
            calls = {n for stats in found.layers.values() for n in (stats.in_calls, stats.out_calls)}
            if calls != {found.calls}:
                yield f"{found.calls} calls, layers that say {calls}"
            if states_path(path).exists():
                kept = load_states(states_path(path), self.info.fingerprint, MAX_STATES).states
                if not 0 < len(kept) <= min(STATES, found.calls):
                    yield f"{len(kept)} states of {found.calls} calls"
        except HSWQError as error:
            yield str(error)

    def _saved(self, session: str) -> int:
        from hswq.hswq_core.calibration.session import load_session
        from hswq.hswq_core.errors import SessionError
        from hswq.loader.sessions.store import path_of

        try:
            return int(load_session(path_of(session)).calls)
        except SessionError:
            return 0

    def _count(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        output = executor(*args, **kwargs)
        self.calls[:] = struct.pack("Q", struct.unpack("Q", self.calls[:])[0] + 1)
        return output
