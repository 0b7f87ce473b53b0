"""HSWQ Report: a session or a converted file as a picture and a table."""

from __future__ import annotations

from dataclasses import astuple

from comfy_api.latest import io, ui

from ..figures.report import picture_of
from ..hswq_core.errors import HSWQError, SettingError
from ..hswq_core.reports.file import FileReport, report_file
from ..hswq_core.reports.session import SessionReport, report_session
from ..loader.convert.file import given_path, listed_files, listed_path
from ..loader.sessions.store import path_of
from ..loader.stamp import Stamp
from .calibration import DEFAULT_SESSION
from .status import check_session_name, session_stamps

NO_FILE = "none"


class HSWQReport(io.ComfyNode):
    """Shows what was measured and what was done."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="HSWQReport",
            display_name="HSWQ Report",
            category="HSWQ",
            description="A picture and a table of a calibration session (is it enough?), or of a converted file: "
            "which layers stay in 16 bits, what each costs, and what the extra bytes bought.",
            is_output_node=True,
            inputs=[
                io.String.Input(
                    "session",
                    default=DEFAULT_SESSION,
                    tooltip="Name of a calibration session. Used when no file is given; may be empty then.",
                ),
                io.Combo.Input(
                    "file",
                    options=[NO_FILE, *listed_files()],
                    default=NO_FILE,
                    tooltip="An FP8 file, ours or another tool's. none: the session.",
                ),
                io.String.Input(
                    "path",
                    optional=True,
                    force_input=True,
                    tooltip="The path output of HSWQ Converter or HSWQ File Converter: one Run converts and reports. "
                    "Goes before file.",
                ),
                io.AnyType.Input(
                    "after",
                    optional=True,
                    tooltip="Anything that must be finished first, for example the picture that calibrates: "
                    "the report then is of the session with it.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="picture", tooltip="The charts, for Preview Image or Save Image."),
                io.String.Output(display_name="table", tooltip="The numbers as text, for Preview as Text."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, session: str | None = "") -> bool | str:
        """A bad name is refused when the workflow is queued, before anything runs."""
        return check_session_name(session) if session else True

    @classmethod
    def fingerprint_inputs(
        cls, session: str | None = "", file: str | None = NO_FILE, **_: object
    ) -> tuple[tuple[int, ...], ...]:
        """Report again whenever the session has grown or the file was replaced, though no widget changed."""
        try:
            if file and file != NO_FILE:
                return (astuple(Stamp.of(listed_path(file))),)
            return () if session == "" else session_stamps(session)
        except (HSWQError, OSError):
            return ()  # executing says what is wrong

    @classmethod
    def execute(cls, session: str, file: str, path: str | None = None, after: object = None) -> io.NodeOutput:
        """Report, and show the picture on the node."""
        report = _report(session, file, path)
        picture = picture_of(report)
        return io.NodeOutput(picture, report.markdown(), ui=ui.PreviewImage(picture, cls=cls))


def _report(session: str, file: str, path: str | None) -> FileReport | SessionReport:
    if path is not None:
        return report_file(given_path(path))
    if file != NO_FILE:
        return report_file(listed_path(file))
    if session:
        return report_session(path_of(session))
    raise SettingError(
        "HSWQ Report",
        got="neither a session nor a file",
        expected="one of them",
        remedy="Type the name of a calibration session, choose a file, or connect a converter's path.",
    )
