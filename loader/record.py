"""What calibration writes down: hooks that feed observers, and a session's part in memory, merged into its file."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..hswq_core import HSWQError, LayerObserver, Session
from ..hswq_core.observer import LastInput
from .model import ModelInfo, input_channels
from .store import PATIENCE, add_to_session, new_session

log = logging.getLogger(__name__)


class HookSet:
    """Hooks on layers, {name: module}, feeding one observer a layer."""

    def __init__(self, modules: Mapping[str, torch.nn.Module]) -> None:
        self.observers: dict[str, LayerObserver] = {}
        self._last = LastInput()
        self._handles: list[Any] = []
        for name, module in modules.items():
            kind, shape = type(module).__name__, tuple(module.weight.shape)
            observer = LayerObserver(name, kind, shape, input_channels(module), self._last)
            self.observers[name] = observer
            # Inputs before the forward: ComfyUI's FP8 matmul clamps its input in place.
            self._handles.append(module.register_forward_pre_hook(_input_hook(observer)))
            self._handles.append(module.register_forward_hook(_output_hook(observer)))

    def end_call(self) -> None:
        """Keep no activation alive between calls."""
        self._last.clear()

    def remove(self) -> None:
        """Take every hook off again."""
        self.end_call()
        while self._handles:
            self._handles.pop().remove()


def _input_hook(observer: LayerObserver) -> Callable[[Any, tuple[Any, ...]], None]:
    def hook(_module: Any, args: tuple[Any, ...]) -> None:
        observer.see_input(args[0])

    return hook


def _output_hook(observer: LayerObserver) -> Callable[[Any, Any, Any], None]:
    def hook(_module: Any, _args: Any, output: Any) -> None:
        observer.see_output(output)

    return hook


class Recorder:
    """What was seen since the last save: a part session of its own, which saving merges into the file.

    So restarts, dropped node caches and several processes all add up.

    Args:
        path: the session's file.
        info: of the model.

    Attributes:
        part: what was seen since the last save.
    """

    def __init__(self, path: Path, info: ModelInfo) -> None:
        self.path, self.info = path, info
        self.part = new_session(info)

    def drain(self, hooks: HookSet) -> None:
        """Take over what the observers have summed up."""
        for name, observer in hooks.observers.items():
            self.part.layers[name].merge(observer.drain())

    def refuse_bad(self) -> bool:
        """Whether a NaN or infinity was seen: then all since the last save is forgotten, and the log says so."""
        bad = [name for name, stats in self.part.layers.items() if not stats.is_finite()]
        if bad:
            log.error(
                "HSWQ calibration: layer %s saw NaN or infinity; the last %d calls are not recorded. "
                "The generation itself is broken (a black picture?): repair it, then calibrate again.",
                bad[0],
                self.part.calls,
            )
            self.part = new_session(self.info)
        return bool(bad)

    def save(self, rest: Callable[[], None] = lambda: None, patience: float = PATIENCE) -> Session | None:
        """Merge into the file; the whole session as saved, or None if nothing was.

        A failure is logged and tried again with the next save: it must not end the generation that is running,
        and the statistics stay in memory.

        Args:
            rest: saved after it, under the same rule.
            patience: seconds to wait while another process saves the same session.
        """
        if not self.part.calls and not self.part.images:
            return None
        self.part.updated = time.time()
        try:
            whole = add_to_session(self.path, self.part, self.info, patience)
            self.part = new_session(self.info)
            rest()
        except (HSWQError, OSError) as error:
            log.error("HSWQ calibration: %s The statistics are kept in memory until the next save.", error)
            return None
        return whole


def status(path: Path, session: Session, *more: str) -> str:
    """Status line: "session_01: SDXL, 794 layers, 312 calls, 8 images, 32 states, saved 14:02"."""
    clock = time.strftime("%H:%M", time.localtime(session.updated))
    return ", ".join([f"{path.stem}: {session.summary()}", *more, f"saved {clock}"])
