"""HSWQ File Converter: a file to an FP8 file, without a model and without a screen full of nodes."""

from __future__ import annotations

from dataclasses import astuple

from comfy_api.latest import io

from ..hswq_core.errors import HSWQError
from ..hswq_core.methods.hswq import DEFAULT_KEEP_RATIO
from ..hswq_core.methods.nearest import NEAREST
from ..hswq_core.methods.table import METHODS
from ..hswq_core.model.presets import AUTO, PRESETS
from ..hswq_core.plan.formats import FORMATS
from ..loader.convert.file import ListedRequest, convert_listed, listed_files, listed_path
from ..loader.stamp import Stamp
from .status import check_session_name, node_progress, session_stamps, show_text


class HSWQFileConverter(io.ComfyNode):
    """Writes a file as FP8, tensor by tensor."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="HSWQFileConverter",
            display_name="HSWQ File Converter",
            category="HSWQ",
            description="Writes a .safetensors file as FP8 without loading the model: text encoders, and models that "
            "are larger than your memory. For diffusion models that fit, HSWQ Converter (model_aware) is much better.",
            is_output_node=True,
            search_aliases=["quantize", "fp8", "float8", "text encoder", "t5xxl", "convert file", "compress"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=listed_files(),
                    tooltip="An FP16, BF16 or FP32 diffusion model, checkpoint (its text encoder and VAE stay as they "
                    "are) or text encoder.",
                ),
                io.Combo.Input(
                    "format",
                    options=list(FORMATS),
                    default="comfy",
                    tooltip="comfy: opens in ComfyUI's own loaders, Load CLIP too. v2: convolutions scaled too, opens "
                    "in HSWQ Loader. v1: plain FP8 for any loader.",
                ),
                io.Combo.Input(
                    "method",
                    options=list(METHODS),
                    default=NEAREST.name,
                    tooltip="nearest: what stock FP8 files are made by. learned: fits the rounding to each weight; "
                    "takes minutes, gains a little. hswq: needs the model's calibration session.",
                ),
                io.Combo.Input(
                    "preset",
                    options=list(PRESETS),
                    default=AUTO,
                    advanced=True,
                    tooltip="; ".join(f"{row.name}: {row.help}" for row in PRESETS.values()),
                ),
                io.String.Input(
                    "session", default="", optional=True, tooltip="hswq: name of the model's calibration session."
                ),
                io.Float.Input(
                    "keep_ratio",
                    default=DEFAULT_KEEP_RATIO,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    advanced=True,
                    tooltip="hswq: share of the layers kept in FP16. More is better and bigger.",
                ),
                io.String.Input(
                    "filename_prefix",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="Put before the file's name, with / for a subfolder.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="path", tooltip="Where the written file lies."),
                io.String.Output(display_name="report", tooltip="What was quantized, kept and skipped."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, session: str | None = "") -> bool | str:
        """A bad name is refused when the workflow is queued, before anything runs."""
        return check_session_name(session) if session else True

    @classmethod
    def fingerprint_inputs(cls, file: str | None, session: str | None = "", **_: object) -> tuple[object, ...]:
        """Convert again whenever the file was replaced or the session has grown, though no widget changed."""
        try:
            own = astuple(Stamp.of(listed_path(file or "")))
            return (own, *(() if session == "" else session_stamps(session)))
        except (HSWQError, OSError):
            return ()  # executing says what is wrong

    @classmethod
    def execute(
        cls,
        file: str,
        format: str,
        method: str,
        preset: str,
        session: str = "",
        keep_ratio: float = DEFAULT_KEEP_RATIO,
        filename_prefix: str = "",
    ) -> io.NodeOutput:
        """Convert, and show the report on the node."""
        node_id = cls.hidden.unique_id
        request = ListedRequest(
            file=file,
            file_format=format,
            method=method,
            preset=preset,
            session=session,
            keep_ratio=keep_ratio,
            filename_prefix=filename_prefix,
        )
        done = convert_listed(request, node_progress(node_id))
        show_text(done.report, node_id)
        return io.NodeOutput(str(done.path), done.report)
