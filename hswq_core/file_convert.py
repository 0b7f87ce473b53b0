"""File to file, without a model in memory: what is asked for, and the finished file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from .convert import Conversion, Planned, report, write_plan
from .errors import SettingError
from .exclusions import Exclusions
from .file_model import FileModel
from .formats import FileFormat, format_for, format_named
from .hswq import check_keep_ratio, plan_hswq
from .names import describe, output_path
from .nearest import plan_nearest
from .plan import Plan, Progress, no_progress
from .presets import AUTO, Preset, preset_named
from .session import Session

DEFAULT_KEEP_RATIO = 0.25
HSWQ, NEAREST = "hswq", "nearest"
METHODS = (HSWQ, NEAREST)


@dataclass(frozen=True)
class FileMethod:
    """A method with its settings.

    Attributes:
        tail: what of the new file's name says how it was made.
        plan: (model, exclusions, format, progress) -> what it decided.
        session: statistics it decides by; None: it needs none.
    """

    tail: str
    plan: Callable[[FileModel, Exclusions, FileFormat, Progress], Planned]
    session: Session | None = None


def hswq(session: Session, keep_ratio: float = DEFAULT_KEEP_RATIO) -> FileMethod:
    """See ``plan_hswq``. Raises SettingError for a ratio out of range."""

    def plan(model: FileModel, exclusions: Exclusions, file_format: FileFormat, progress: Progress) -> Planned:
        return Planned(
            plan_hswq(
                model.layers,
                session,
                model.read,
                exclusions=exclusions,
                file_format=file_format,
                keep_ratio=keep_ratio,
                progress=progress,
            )
        )

    return FileMethod(describe(session.calls, f"{check_keep_ratio(keep_ratio):g}"), plan, session)


def nearest() -> FileMethod:
    """See ``plan_nearest``."""

    def plan(model: FileModel, exclusions: Exclusions, file_format: FileFormat, progress: Progress) -> Planned:
        found = plan_nearest(
            model.layers, model.read, exclusions=exclusions, file_format=file_format, progress=progress
        )
        return Planned(found)

    return FileMethod(NEAREST, plan)


def file_method(name: str, session: Session | None = None, keep_ratio: float = DEFAULT_KEEP_RATIO) -> FileMethod:
    """A method by its name, with the settings it knows.

    Raises:
        SettingError: an unknown name, no session for a method that needs one, or a ratio out of range.
    """
    if name == NEAREST:
        return nearest()
    if name != HSWQ:
        raise SettingError("method", got=repr(name), expected=" or ".join(METHODS), remedy="Choose one of them.")
    if session is None:
        raise SettingError(
            "session",
            got="none",
            expected=f"the statistics of this model, for method {name}",
            remedy=f"Calibrate it in ComfyUI and give the session, or choose method {NEAREST}.",
        )
    return hswq(session, keep_ratio)


@dataclass(frozen=True)
class FileJob:
    """A file, opened for conversion.

    Attributes:
        model: the file's model.
        method: how its layers are decided about.
        file_format: as loaders of this family read it.

    Raises:
        SettingError: a format that no loader of this family opens.
    """

    model: FileModel
    method: FileMethod
    file_format: FileFormat

    @classmethod
    def open(
        cls, path: Path, method: FileMethod, file_format: str, preset: Preset | None = None, device: str = "cpu"
    ) -> FileJob:
        """See ``FileModel`` and ``format_for``."""
        model = FileModel(path, method.session, preset or preset_named(AUTO), device)
        return cls(model, method, format_for(format_named(file_format), model.family))

    def target(self, folder: Path, prefix: str = "") -> Path:
        """A free name, ``<model>_<method's tail>_<format>``; see ``output_path``."""
        return output_path(folder, prefix, f"{self.model.source.name}_{self.method.tail}_{self.file_format.name}")

    def write(
        self, target: Path, progress: Progress = no_progress, check: Callable[[Path, Plan], None] | None = None
    ) -> tuple[Conversion, str]:
        """Plan, and write the file.

        Args:
            progress: called as (what, bytes done, bytes in all); may raise to cancel.
            check: called with the finished temporary file and its plan before it gets its name; raises to refuse it.

        Returns:
            The finished file and a report.

        Raises:
            LayerError, FileError: see ``plan_hswq``, ``plan_nearest`` and ``write_checkpoint``.
        """
        model, session = self.model, self.method.session
        family = replace(model.family, never=(*model.family.never, *model.preset.keep))
        planned = self.method.plan(model, Exclusions(family), self.file_format, progress)
        plan = planned.plan
        done = write_plan(
            target,
            model.source,
            model.prefix,
            plan,
            session,
            solutions=planned.solutions,
            progress=progress,
            check=None if check is None else lambda temporary: check(temporary, plan),
        )
        return done, "\n".join([report(done, session), *model.notes(), *planned.notes])
