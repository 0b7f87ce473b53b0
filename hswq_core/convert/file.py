"""File to file, without a model in memory: what is asked for, and the finished file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from ..calibration.session import Session
from ..errors import SettingError
from ..files.atomic import require_space, require_writable
from ..files.names import describe, output_path
from ..methods.exclusions import Exclusions
from ..methods.hswq import DEFAULT_KEEP_RATIO, check_keep_ratio, plan_hswq
from ..methods.learned import LEARNED, LearnedOptions, plan_learned
from ..methods.nearest import plan_nearest
from ..methods.solutions import Workspace, passing_workspace
from ..model.presets import AUTO, Preset, preset_named
from ..plan.budget import smallest_size
from ..plan.formats import FileFormat, format_for, format_named
from ..plan.plan import Plan
from ..progress import Progress, no_progress
from .file_model import FileModel
from .output import Conversion, report, write_plan

HSWQ, NEAREST = "hswq", "nearest"
METHODS = (HSWQ, LEARNED, NEAREST)


@dataclass(frozen=True)
class Task:
    """What a method plans with.

    Attributes:
        model: the file's.
        exclusions: layers never quantized.
        file_format: as loaders of this family read it.
        solutions: takes the codes of the layers that the method rounds itself.
        progress: called as (step, bytes done, bytes in all); may raise to cancel.
    """

    model: FileModel
    exclusions: Exclusions
    file_format: FileFormat
    solutions: Workspace
    progress: Progress


@dataclass(frozen=True)
class FileMethod:
    """A method with its settings.

    Attributes:
        tail: what of the new file's name says how it was made.
        plan: decides about every layer.
        session: statistics it decides by; None: it needs none.
    """

    tail: str
    plan: Callable[[Task], Plan]
    session: Session | None = None


def hswq(session: Session, keep_ratio: float = DEFAULT_KEEP_RATIO) -> FileMethod:
    """See ``plan_hswq``. Raises SettingError for a ratio out of range."""

    def plan(task: Task) -> Plan:
        return plan_hswq(
            task.model.layers,
            session,
            task.model.read,
            exclusions=task.exclusions,
            file_format=task.file_format,
            keep_ratio=keep_ratio,
            progress=task.progress,
        )

    return FileMethod(describe(session.calls, f"{check_keep_ratio(keep_ratio):g}"), plan, session)


def learned(options: LearnedOptions) -> FileMethod:
    """See ``plan_learned``."""

    def plan(task: Task) -> Plan:
        return plan_learned(
            task.model.layers,
            task.model.read,
            task.solutions.add,
            exclusions=task.exclusions,
            file_format=task.file_format,
            options=options,
            progress=task.progress,
        )

    return FileMethod(LEARNED, plan)


def nearest() -> FileMethod:
    """See ``plan_nearest``."""

    def plan(task: Task) -> Plan:
        return plan_nearest(
            task.model.layers,
            task.model.read,
            exclusions=task.exclusions,
            file_format=task.file_format,
            progress=task.progress,
        )

    return FileMethod(NEAREST, plan)


def file_method(
    name: str,
    session: Session | None = None,
    keep_ratio: float = DEFAULT_KEEP_RATIO,
    options: LearnedOptions | None = None,
) -> FileMethod:
    """A method by its name, with the settings it knows.

    Raises:
        SettingError: an unknown name, no session for a method that needs one, or a ratio out of range.
    """
    if name == NEAREST:
        return nearest()
    if name == LEARNED:
        return learned(options or LearnedOptions())
    if name != HSWQ:
        raise SettingError("method", got=repr(name), expected=" or ".join(METHODS), remedy="Choose one of them.")
    if session is None:
        raise SettingError(
            "session",
            got="none",
            expected=f"the statistics of this model, for method {name}",
            remedy=f"Calibrate it in ComfyUI and give the session, or choose {LEARNED} or {NEAREST}.",
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
            progress: called as (step, bytes done, bytes in all); may raise to cancel.
            check: called with the finished temporary file and its plan before it gets its name; raises to refuse it.

        Returns:
            The finished file and a report.

        Raises:
            LayerError, FileError: see the method's own plan and ``write_checkpoint``.
        """
        require_writable(target.parent)
        require_space(self._room(target))
        model, session = self.model, self.method.session
        exclusions = Exclusions(replace(model.family, never=(*model.family.never, *model.preset.keep)))
        with passing_workspace(target.parent) as solutions:
            plan = self.method.plan(Task(model, exclusions, self.file_format, solutions, progress))
            done = write_plan(
                target,
                model.source,
                model.prefix,
                plan,
                session,
                solutions=solutions,
                progress=progress,
                check=None if check is None else lambda temporary: check(temporary, plan),
                device=model.device,
            )
        return done, "\n".join([report(done, session), *model.notes()])

    def _room(self, target: Path) -> dict[Path, int]:
        """{file: bytes} taken at least; codes that a method rounds itself lie on the disk until they are written."""
        model = self.model
        codes = sum(layer.weights for layer in model.layers) if self.method.tail == LEARNED else 0
        return {target: smallest_size(model.source.entries, model.prefix, model.layers) + codes}
