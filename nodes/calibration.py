"""HSWQ Calibration: observe a model while it draws."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from comfy_api.latest import io

from ..hswq_core.calibration.states import AUTO
from ..loader.calibration.model import calibrated
from ..loader.calibration.text import calibrated_clip
from ..loader.sessions.store import path_of
from .status import check_session_name, show_text

if TYPE_CHECKING:
    from ..loader.comfyui.types import CLIP, ModelPatcher

DEFAULT_SESSION = "session_01"
MEASURE_EVERY = 4


class HSWQCalibration(io.ComfyNode):
    """MODEL in, the same MODEL out; its sampling runs are recorded."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="HSWQCalibration",
            display_name="HSWQ Calibration",
            category="HSWQ",
            description="Put it between model loader and sampler and generate as usual: statistics of every layer "
            "add up in output/hswq_stats, over runs and restarts. The picture does not change.",
            search_aliases=["calibrate", "quantize", "fp8", "statistics", "activations"],
            inputs=[
                io.Model.Input("model", tooltip="The unquantized (FP16/BF16) model."),
                io.String.Input(
                    "session",
                    default=DEFAULT_SESSION,
                    tooltip="Name of the statistics. Use one name per model; runs of the same name add up.",
                ),
                io.Int.Input(
                    "save_every",
                    default=50,
                    min=1,
                    max=100000,
                    advanced=True,
                    tooltip="Model calls between two saves within a run. The end of a run always saves.",
                ),
                io.Int.Input(
                    "states",
                    default=AUTO,
                    min=AUTO,
                    max=1024,
                    optional=True,
                    advanced=True,
                    tooltip="Model calls kept beside the statistics, a random sample of all runs. The converter runs "
                    "the model on them again. -1: 128 of pictures of 1024 x 1024, up to 512 of smaller ones. 0: none.",
                ),
                io.Int.Input(
                    "measure_every",
                    default=MEASURE_EVERY,
                    min=1,
                    max=100,
                    optional=True,
                    advanced=True,
                    tooltip="Measures every n-th model call on average, spread evenly over steps and pictures. 1: "
                    "every call, which slows drawing down by a quarter and changes hardly anything.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="A text encoder to record too, while it encodes prompts: a session of its own for each "
                    "encoder, for HSWQ File Converter. Prompts must then get this node's clip.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model", tooltip="The same model, recorded while it draws. Connect the sampler here."
                ),
                io.Clip.Output(
                    display_name="clip",
                    tooltip="The same text encoder, recorded while it encodes prompts. Nothing without the input clip.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, session: str | None) -> bool | str:
        """A bad name is refused when the workflow is queued, before anything runs."""
        return check_session_name(session)

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        session: str,
        save_every: int,
        states: int = AUTO,
        measure_every: int = MEASURE_EVERY,
        clip: CLIP | None = None,
    ) -> io.NodeOutput:
        """Wrap a clone of the model, and of the text encoder."""
        report, path = partial(show_text, node_id=cls.hidden.unique_id), path_of(session)
        encoder = None if clip is None else calibrated_clip(clip, path, report)
        return io.NodeOutput(calibrated(model, path, save_every, report, states, measure_every), encoder)
