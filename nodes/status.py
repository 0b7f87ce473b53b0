"""What the nodes share: text and progress on a node, the check of a session name."""

from __future__ import annotations

import time
from dataclasses import astuple

import comfy.model_management
import comfy.utils

from ..hswq_core.calibration.states_file import states_path
from ..hswq_core.errors import SettingError
from ..hswq_core.progress import Progress, Step, time_left
from ..loader.comfyui.server import prompt_server
from ..loader.sessions.store import path_of, sessions_folder
from ..loader.stamp import Stamp


def check_session_name(session: str | None) -> bool | str:
    """True, or the message ComfyUI shows at the input; None is a linked name, known only when the node runs."""
    if session is None:
        return True
    try:
        path_of(session)
    except SettingError as error:
        return str(error)
    return True


def session_stamps(session: str | None) -> tuple[tuple[int, ...], ...]:
    """Changes whenever a session or its recorded calls grow; for None, a linked name, whenever any session's do.

    Raises:
        SettingError: not a plain name.
    """
    paths = sorted(sessions_folder().glob("*.pt")) if session is None else [path_of(session)]
    files = [part for path in paths for part in (path, states_path(path)) if part.exists()]
    return tuple(astuple(Stamp.of(path)) for path in files)


def show_text(text: str, node_id: str | None) -> None:
    """Text under the node ``node_id`` in the page (the UI text of a result is not shown on custom nodes)."""
    server = prompt_server() if node_id else None
    if node_id and server is not None:
        server.send_progress_text(text, node_id)


def node_progress(node_id: str | None) -> Progress:
    """A callback for long work: progress bar, text with the time left on the node, and Cancel.

    Cancel raises ComfyUI's InterruptProcessingException out of the callback.
    """
    bars: dict[str, comfy.utils.ProgressBar] = {}
    started: dict[str, tuple[float, int]] = {}  # when, and what an earlier run had already done

    def progress(step: Step, done: int, total: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        stage = step.stage
        if stage not in bars:
            bars[stage] = comfy.utils.ProgressBar(max(total, 1), node_id=node_id)
            started[stage] = time.monotonic(), done
        bars[stage].update_absolute(done, max(total, 1))
        start, before = started[stage]
        left = time_left(time.monotonic() - start, done - before, total - before)
        show_text(f"{step} ({done / max(total, 1):.0%}{left})", node_id)

    return progress
