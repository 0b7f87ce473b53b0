"""What calibration records: hooks that feed observers, and a session's part in memory, merged into its file."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ...hswq_core.calibration.exclusive import PATIENCE
from ...hswq_core.calibration.observer import LastInput, LayerObserver
from ...hswq_core.errors import HSWQError
from ...hswq_core.model.kinds import kind_of
from ..comfyui.layers import weight_of
from ..model import ModelInfo
from ..sessions.store import add_to_session, new_session, open_session

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

log = logging.getLogger(__name__)


class HookSet:
    """Hooks on layers, {name: module}, feeding one observer per layer.

    Attributes:
        watching: whether they do so; off for calls that are not measured.
    """

    def __init__(self, modules: Mapping[str, torch.nn.Module]) -> None:
        self.watching = True
        self.observers: dict[str, LayerObserver] = {}
        self._last = LastInput()
        self._handles: list[RemovableHandle] = []
        for name, module in modules.items():
            kind = kind_of(module)
            observer = LayerObserver(name, kind.name, tuple(weight_of(module).shape), kind.channels(module), self._last)
            self.observers[name] = observer
            # Inputs before the forward: ComfyUI's FP8 matmul clamps its input in place.
            self._handles.append(module.register_forward_pre_hook(self._input_hook(observer)))
            self._handles.append(module.register_forward_hook(self._output_hook(observer)))

    def end_call(self) -> None:
        """Keep no activation alive between calls."""
        self._last.clear()

    def remove(self) -> None:
        """Remove all hooks."""
        self.end_call()
        while self._handles:
            self._handles.pop().remove()

    def _input_hook(self, observer: LayerObserver) -> Callable[[torch.nn.Module, tuple[torch.Tensor, ...]], None]:
        def hook(_module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            if self.watching:
                observer.see_input(args[0])

        return hook

    def _output_hook(self, observer: LayerObserver) -> Callable[[torch.nn.Module, object, torch.Tensor], None]:
        def hook(_module: torch.nn.Module, _args: object, output: torch.Tensor) -> None:
            if self.watching:
                observer.see_output(output)

        return hook


class Recorder:
    """What was seen since the last save: a partial session, which saving merges into the file.

    That way restarts, dropped node caches and several processes all add up.

    Args:
        path: the session's file, if there is one yet.
        info: of the model.

    Attributes:
        part: what was seen since the last save.
        calls: how many the file has.
        saved: when it was last written, seconds since the epoch; None: there is none yet.

    Raises:
        SessionError: the file is damaged, or of another model.
    """

    def __init__(self, path: Path, info: ModelInfo) -> None:
        self.path, self.info = path, info
        self.part = new_session(info)
        existing = open_session(path, info) if path.exists() else None
        self.calls = existing.calls if existing else 0
        self.saved: float | None = existing.updated if existing else None
        self._failed = False

    @property
    def all_calls(self) -> int:
        """Calls in the file, and those not saved yet."""
        return self.calls + self.part.calls

    def drain(self, hooks: HookSet) -> None:
        """Merge in what the observers have summed up."""
        for name, observer in hooks.observers.items():
            self.part.layers[name].merge(observer.drain())

    def refuse_bad(self) -> bool:
        """Whether a NaN or infinity was seen: if so, all since the last save is discarded, and the log says so."""
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

    def save(self, rest: Callable[[], None] = lambda: None, patience: float = PATIENCE) -> None:
        """Merge into the file.

        A failure is logged and retried with the next save: it must not end the running generation, and the
        statistics stay in memory.

        Args:
            rest: called after it, under the same rule.
            patience: seconds to wait while another process saves the same session.
        """
        if not self.part.calls and not self.part.images:
            return
        self.part.updated = time.time()
        try:
            whole = add_to_session(self.path, self.part, self.info, patience)
            self.part = new_session(self.info)
            self.calls, self.saved = whole.calls, whole.updated
            rest()
        except (HSWQError, OSError) as error:
            self._failed = True
            log.error("HSWQ calibration: %s The statistics are kept in memory until the next save.", error)
            return
        self._failed = False

    def status(self, name: str = "") -> str:
        """Status line: "SDXL · 794 layers · 312 calls · saved 14:02"; unsaved calls count too.

        Args:
            name: what to call the model, if not by its family.
        """
        saved = "unsaved" if self.saved is None else time.strftime("saved %H:%M", time.localtime(self.saved))
        last = "saving failed, see the log" if self._failed else saved
        layers = len(self.part.layers)
        return " · ".join([name or self.part.family, f"{layers} layers", f"{self.all_calls} calls", last])
