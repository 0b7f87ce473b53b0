"""Interface of a method: how it decides about every layer, what it needs to do so, and its settings.

The node, the file converter and the command line share the same rows: ``table`` has the methods that need no running
model, ``loader/convert/methods`` adds the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Generic, Protocol, TypeVar

import torch

from ..calibration.session import Session
from ..errors import SettingError
from ..files.names import describe
from ..model.layer import Layer
from ..plan.encoding import Encoding
from ..plan.plan import Plan
from ..progress import Progress, no_progress
from .exclusions import Exclusions
from .solutions import Solutions
from .solve import Solution

# What a method may need besides the weights: a session's statistics, its recorded model calls, the running model.
SESSION, STATES, MODEL = "session", "states", "model"


@dataclass(frozen=True, kw_only=True)
class Task:
    """Everything a method plans with.

    Attributes:
        layers: every layer of the model, in model order.
        read: returns a layer's weight, on any device; it is rounded there.
        exclusions: layers that are never quantized.
        encoding: how layers are stored.
        solutions: stores the codes of layers that the method rounds itself.
        session: statistics of the same model; None for methods that need none.
        progress: counts bytes of weights; may raise to cancel.
    """

    layers: list[Layer]
    read: Callable[[Layer], torch.Tensor]
    exclusions: Exclusions
    encoding: Encoding
    solutions: Solutions
    session: Session | None = None
    progress: Progress = no_progress


@dataclass(frozen=True)
class Planned:
    """Result of a method.

    Attributes:
        plan: which layers are kept or quantized, and how.
        solutions: codes of the layers that the method rounded itself; all others are rounded to nearest.
        notes: lines for the report.
    """

    plan: Plan
    solutions: Mapping[str, Solution] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


class Settings(Protocol):
    """A frozen dataclass with user-visible field names; raises SettingError for values out of range."""

    @property
    def text(self) -> str:
        """The budget as it appears in file names; "" for methods without one."""

    def extra_bytes(self, smallest: int, layers: int) -> int:
        """Bytes beyond a file of ``smallest`` bytes with all ``layers`` quantized, if known before planning."""


@dataclass(frozen=True)
class NoBudget:
    """Base for the settings of methods whose file size is not known beforehand; alone, for methods without settings."""

    @property
    def text(self) -> str:
        """No budget."""
        return ""

    def extra_bytes(self, smallest: int, layers: int) -> int:  # noqa: ARG002 - the protocol's
        """No extra bytes."""
        return 0


T_contra = TypeVar("T_contra", bound=Task, contravariant=True)


@dataclass(frozen=True)
class Method(Generic[T_contra]):
    """One row.

    Attributes:
        name: the user-visible name, also written to files.
        plan: (task, settings) -> Planned.
        needs: subset of ``SESSION``, ``STATES``, ``MODEL``.
        settings: class of its settings, a ``Settings``.
        own_codes: whether it rounds layers itself, so that their codes take disk space until the file is written.
        options: whether it supports an encoding's options; else layers are stored in the format's default way.
    """

    name: str
    plan: Callable[[T_contra, Any], Planned]
    needs: frozenset[str] = frozenset()
    settings: type[Any] = NoBudget
    own_codes: bool = False
    options: bool = False

    def chosen(self, inputs: object) -> Settings:
        """Its settings, taken from the attributes of ``inputs`` by name; defaults for missing ones."""
        names = [f.name for f in fields(self.settings) if hasattr(inputs, f.name)]
        settings: Settings = self.settings(**{name: getattr(inputs, name) for name in names})
        return settings

    def tail(self, settings: Settings, session: Session | None) -> str:
        """The part of a new file's name that says how it was made."""
        return self.name if session is None else describe(session.calls, settings.text)


def method_named(name: str, methods: Mapping[str, Method[T_contra]]) -> Method[T_contra]:
    """The row called ``name``; SettingError for any other."""
    if name not in methods:
        raise SettingError("method", got=repr(name), expected=" or ".join(methods), remedy="Choose one of them.")
    return methods[name]


def require_session(method: str, session: Session | None) -> Session:
    """The session, required by ``method``; SettingError if there is none."""
    if session is None:
        raise SettingError(
            "session",
            got="none",
            expected=f"the statistics of this model, for method {method}",
            remedy="Calibrate it in ComfyUI and give the session, or choose learned or nearest.",
        )
    return session


def require_options(method: Method[Any], encoding: Encoding, methods: Mapping[str, Method[Any]]) -> None:
    """Raise SettingError for encoding options that ``method`` does not support."""
    if method.options or encoding == Encoding(encoding.file_format):
        return
    able = " or ".join(row.name for row in methods.values() if row.options)
    raise SettingError(
        "scale_per, fast_matmul",
        got=f"{encoding.granularity}, {encoding.fast_matmul:g} with method {method.name}",
        expected=f"method {able}",
        remedy=f"Choose {able}, or leave both at their defaults.",
    )
