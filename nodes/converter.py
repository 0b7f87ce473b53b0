"""HSWQ Converter: one click from a calibrated model to an FP8 file."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from comfy_api.latest import io

from ..hswq_core.errors import HSWQError
from ..hswq_core.methods.hswq import DEFAULT_KEEP_RATIO
from ..hswq_core.plan.budget import DEFAULT_EXTRA_PERCENT
from ..hswq_core.plan.encoding import MOST_LOSS_DB
from ..hswq_core.plan.formats import FORMATS
from ..hswq_core.quant.schemes.scheme import GRANULARITIES, TENSOR
from ..loader.convert.methods import METHODS, MODEL_AWARE
from ..loader.convert.model import Request, convert_model
from .calibration import DEFAULT_SESSION
from .status import check_session_name, node_progress, session_stamps, show_text

if TYPE_CHECKING:
    from ..loader.comfyui.types import CLIP, VAE, ModelPatcher


class HSWQConverter(io.ComfyNode):
    """Writes the connected model as FP8."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="HSWQConverter",
            display_name="HSWQ Converter",
            category="HSWQ",
            description="Writes the model as an FP8 file, by the statistics of a calibration session, into "
            "output/checkpoints (with clip and vae connected) or output/diffusion_models, where ComfyUI's loaders "
            "find it.",
            is_output_node=True,
            search_aliases=["quantize", "fp8", "float8", "e4m3fn", "convert model", "save fp8", "compress"],
            inputs=[
                io.Model.Input("model", tooltip="The model that was calibrated; connected LoRAs are merged."),
                io.String.Input("session", default=DEFAULT_SESSION, tooltip="Name of the calibration session."),
                io.Combo.Input(
                    "format",
                    options=list(FORMATS),
                    default="comfy",
                    tooltip="comfy: opens in ComfyUI's own loaders. v2: convolutions scaled too, opens in HSWQ Loader. "
                    "v1: plain FP8 for any loader.",
                ),
                io.Combo.Input(
                    "method",
                    options=list(METHODS),
                    default=MODEL_AWARE.name,
                    tooltip="model_aware: runs the model on the calls that calibration kept, rounds each layer for its "
                    "real inputs and keeps in FP16 what changes the output most for its size. "
                    "hswq: keep the layers of largest output variance in FP16, clip-search the others.",
                ),
                io.Float.Input(
                    "extra_percent",
                    default=DEFAULT_EXTRA_PERCENT,
                    min=0.0,
                    max=100.0,
                    step=0.5,
                    tooltip="model_aware: how much larger the file may be than with every layer in 8 bits. "
                    "3 is plenty.",
                ),
                io.Float.Input(
                    "keep_ratio",
                    default=DEFAULT_KEEP_RATIO,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip="hswq: share of the layers kept in FP16. More is better and bigger.",
                ),
                io.String.Input(
                    "filename_prefix",
                    default="",
                    advanced=True,
                    tooltip="Put before the file's name, with / for a subfolder. "
                    "The rest says the model, the calls, the budget and the format.",
                ),
                io.Float.Input(
                    "target_mb",
                    default=0.0,
                    min=0.0,
                    max=1000000.0,
                    step=1.0,
                    optional=True,
                    advanced=True,
                    tooltip="model_aware: size of the whole file in MB, instead of extra_percent. 0: not used.",
                ),
                io.Combo.Input(
                    "scale_per",
                    options=list(GRANULARITIES),
                    default=TENSOR,
                    optional=True,
                    advanced=True,
                    tooltip="model_aware, v2: one scale for a whole layer, or for each of its output channels. "
                    "Worth little on the models it was measured on; only HSWQ Loader reads it.",
                ),
                io.Float.Input(
                    "fast_matmul",
                    default=0.0,
                    min=0.0,
                    max=MOST_LOSS_DB,
                    step=1.0,
                    optional=True,
                    advanced=True,
                    tooltip="model_aware, comfy: cards with FP8 compute multiply in 8 bits in as many layers as this "
                    "loss allows, in dB of the model's output. Faster, less exact. 0: none, 3: careful, 100: all.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="With vae: write a whole checkpoint; the text encoder in it is not quantized.",
                ),
                io.Vae.Input(
                    "vae", optional=True, tooltip="With clip: write a whole checkpoint; the VAE in it is not quantized."
                ),
                io.AnyType.Input(
                    "after",
                    optional=True,
                    tooltip="Anything made by the calibrated model, for example the decoded picture: "
                    "the conversion then waits for it, and one Run calibrates and converts.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="path", tooltip="Where the written file lies."),
                io.String.Output(
                    display_name="report", tooltip="What was quantized, kept and skipped, and what was measured."
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, session: str | None) -> bool | str:
        """A bad name is refused when the workflow is queued, before anything runs."""
        return check_session_name(session)

    @classmethod
    def fingerprint_inputs(cls, session: str | None, **inputs: object) -> tuple[object, ...]:
        """Convert again whenever the session has grown, though no widget changed; if linked, whenever any has."""
        try:
            return session_stamps(session)
        except (HSWQError, OSError):
            return (time.time(),)

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        session: str,
        format: str,
        method: str,
        extra_percent: float,
        keep_ratio: float,
        filename_prefix: str = "",
        clip: CLIP | None = None,
        vae: VAE | None = None,
        after: object = None,
        target_mb: float = 0.0,
        scale_per: str = TENSOR,
        fast_matmul: float = 0.0,
    ) -> io.NodeOutput:
        """Convert, and show the report on the node."""
        node_id = cls.hidden.unique_id
        request = Request(
            session=session,
            file_format=format,
            method=method,
            extra_percent=extra_percent,
            keep_ratio=keep_ratio,
            filename_prefix=filename_prefix,
            target_mb=target_mb,
            scale_per=scale_per,
            fast_matmul=fast_matmul,
        )
        done = convert_model(model, clip, vae, request, node_progress(node_id))
        show_text(done.report, node_id)
        return io.NodeOutput(str(done.path), done.report)
