"""HSWQ Calibration Prompts: another prompt and another noise for every picture of a batch count."""

from __future__ import annotations

from comfy_api.latest import io

from ..hswq_core.calibration.prompts import SEEDS, prompts_in, turn
from .status import show_text


class HSWQCalibrationPrompts(io.ComfyNode):
    """The prompt whose turn it is."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="HSWQCalibrationPrompts",
            display_name="HSWQ Calibration Prompts",
            category="HSWQ",
            description="Gives the next of 128 varied prompts at every Run, and a seed for its noise. Link prompt to "
            "the text encoder and seed to the sampler, set the batch count to 32, and press Run once.",
            inputs=[
                io.Int.Input(
                    "index",
                    default=0,
                    min=0,
                    max=SEEDS - 1,
                    control_after_generate=io.ControlAfterGenerate.increment,
                    tooltip="Whose turn it is. Counts up by itself; after the last prompt comes the first one again, "
                    "with another seed. Set it back to 0 for a new session.",
                ),
                io.String.Input(
                    "prompts",
                    default="",
                    multiline=True,
                    optional=True,
                    advanced=True,
                    placeholder="one prompt a line; empty: the 128 that come with HSWQ",
                    tooltip="Prompts of your own, one a line, such as your model will be used with. "
                    "Empty: the 128 that come with HSWQ.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="prompt", tooltip="The prompt whose turn it is, for CLIP Text Encode."),
                io.Int.Output(display_name="seed", tooltip="A seed for the sampler, another one for each index."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, index: int, prompts: str = "") -> io.NodeOutput:
        """Output it, and show it on the node."""
        now = turn(index, prompts_in(prompts))
        show_text(now.describe(), cls.hidden.unique_id)
        return io.NodeOutput(now.prompt, now.seed)
