"""HSWQ Merge Sessions: what several machines or runs have recorded, as one session."""

from __future__ import annotations

from dataclasses import astuple

from comfy_api.latest import io

from ..hswq_core.errors import HSWQError
from ..loader.sessions.merge import merge_named, session_names
from ..loader.sessions.store import path_of
from ..loader.stamp import Stamp
from .status import check_session_name, show_text


class HSWQMergeSessions(io.ComfyNode):
    """Adds up sessions of one model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="HSWQMergeSessions",
            display_name="HSWQ Merge Sessions",
            category="HSWQ",
            description="Adds up calibration sessions of one model, for example from several machines, as if one had "
            "recorded them all. The sessions stay; the sum is a new one.",
            is_output_node=True,
            inputs=[
                io.String.Input(
                    "sessions",
                    multiline=True,
                    default="",
                    tooltip="Names of two or more sessions of the same model, one a line. Sessions of other machines: "
                    "copy their .pt and .states.safetensors into output/hswq_stats first.",
                ),
                io.String.Input(
                    "name", default="merged", tooltip="Name of the new session. An existing one is never changed."
                ),
            ],
            outputs=[
                io.String.Output(
                    display_name="session", tooltip="The new session's name, for HSWQ Converter's session."
                ),
                io.String.Output(display_name="report", tooltip="What went in and what came out."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, sessions: str | None, name: str | None) -> bool | str:
        """Bad names are refused when the workflow is queued, before anything runs."""
        try:
            if sessions is not None:
                session_names(sessions)
        except HSWQError as error:
            return str(error)
        return check_session_name(name)

    @classmethod
    def fingerprint_inputs(cls, sessions: str | None, **_: object) -> tuple[object, ...]:
        """Merge again whenever a session has grown, though no widget changed."""
        try:
            return tuple(astuple(Stamp.of(path_of(name))) for name in session_names(sessions or ""))
        except HSWQError:
            return ()  # linked, or executing says what is wrong

    @classmethod
    def execute(cls, sessions: str, name: str) -> io.NodeOutput:
        """Merge, and show on the node what was added up."""
        report = merge_named(sessions, name)
        show_text(report, cls.hidden.unique_id)
        return io.NodeOutput(name, report)
