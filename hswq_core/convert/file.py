"""File-to-file conversion without a model in memory: the request and the job."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from ..calibration.session import Session
from ..files.atomic import require_space, require_writable
from ..files.names import output_path
from ..methods.exclusions import Exclusions
from ..methods.method import SESSION, Method, Settings, Task, method_named, require_session
from ..methods.solutions import passing_solutions
from ..methods.table import METHODS
from ..model.presets import AUTO, PRESETS, Preset, preset_named
from ..plan.budget import smallest_size
from ..plan.encoding import Encoding
from ..plan.formats import format_for, format_named
from ..plan.plan import Plan
from ..progress import Progress, no_progress
from .conversion import Conversion
from .file_model import FileModel
from .output import Output


@dataclass(frozen=True)
class FileRequest:
    """How to convert a file.

    Attributes:
        method: a row of the methods table.
        settings: settings of the method.
        file_format: name of a format.
        session: statistics for the method; None if it needs none.
        preset: options beyond the family's rules.
        device: where weights are processed.

    Raises:
        SettingError: no session for a method that needs one.
    """

    method: Method[Task]
    settings: Settings
    file_format: str
    session: Session | None = None
    preset: Preset = PRESETS[AUTO]
    device: str = "cpu"

    def __post_init__(self) -> None:
        if SESSION in self.method.needs:
            require_session(self.method.name, self.session)

    @classmethod
    def named(
        cls,
        method: str,
        file_format: str,
        inputs: object = None,
        *,
        session: Session | None = None,
        preset: str = AUTO,
        device: str = "cpu",
    ) -> FileRequest:
        """Build from user-visible names; ``inputs`` has the method's settings as attributes.

        Raises:
            SettingError: an unknown name, a setting out of range, or no session for a method that needs one.
        """
        row = method_named(method, METHODS)
        return cls(row, row.chosen(inputs), file_format, session, preset_named(preset), device)


@dataclass(frozen=True)
class FileJob:
    """A file opened for conversion.

    Attributes:
        request: how to convert it.
        model: the file's model.
        encoding: the format as this family's loaders read it.
    """

    request: FileRequest
    model: FileModel
    encoding: Encoding

    @classmethod
    def open(cls, path: Path, request: FileRequest) -> FileJob:
        """See ``FileModel`` and ``format_for``.

        Raises:
            SettingError: a format that no loader of this family opens.
        """
        session = request.session if SESSION in request.method.needs else None
        model = FileModel(path, session, request.preset, request.device)
        return cls(request, model, Encoding(format_for(format_named(request.file_format), model.family)))

    def target(self, folder: Path, prefix: str = "") -> Path:
        """A free path, ``<model>_<method's tail>_<format>``; see ``output_path``."""
        tail = self.request.method.tail(self.request.settings, self.model.session)
        return output_path(folder, prefix, f"{self.model.source.name}_{tail}_{self.encoding.file_format.name}")

    def write(
        self, target: Path, progress: Progress = no_progress, check: Callable[[Path, Plan], None] | None = None
    ) -> Conversion:
        """Plan and write the file.

        Args:
            progress: may raise to cancel.
            check: called with the finished temporary file and its plan before it is renamed; raises to reject it.

        Raises:
            LayerError, FileError: see the method's plan function and ``write_checkpoint``.
        """
        require_writable(target.parent)
        require_space(self._room(target))
        model = self.model
        exclusions = Exclusions(replace(model.family, never=(*model.family.never, *model.preset.keep)))
        with passing_solutions(target.parent) as solutions:
            task = Task(
                layers=model.layers,
                read=model.read,
                exclusions=exclusions,
                encoding=self.encoding,
                solutions=solutions,
                session=model.session,
                progress=progress,
            )
            planned = self.request.method.plan(task, self.request.settings)
            plan = planned.plan
            output = Output(model.source, model.prefix, plan, model.session, planned.solutions, model.device)
            done = output.write(target, progress, check and (lambda temporary: check(temporary, plan)))
        return replace(done, notes=(*planned.notes, *model.notes()))

    def _room(self, target: Path) -> dict[Path, int]:
        """{file: bytes} needed at least, including codes a method rounds itself, which stay on disk until written."""
        model, scheme = self.model, self.encoding.scheme
        size = smallest_size(model.source.entries, model.prefix, model.layers, scheme)
        if self.request.method.own_codes:
            size += sum(scheme(layer.kind).nbytes(layer.shape) for layer in model.layers)
        return {target: size}
