"""HSWQ Compare: how far the pictures of one model are from those of another, in numbers, words and colours."""

from __future__ import annotations

import torch
from comfy_api.latest import io, ui

from ..figures.compare import compare
from ..figures.side_by_side import flicker, side_by_side
from .status import node_progress, show_text

DEFAULT_AMPLIFY = 8.0  # as in the contact sheets of bench/results


class HSWQCompare(io.ComfyNode):
    """Two batches of pictures -> scores, a verdict, the worst pair."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="HSWQCompare",
            display_name="HSWQ Compare",
            category="HSWQ",
            description="Compares pictures of a quantized model with the original model's, drawn with the same prompts "
            "and seeds: PSNR, SSIM, a verdict in words, and the worst pair with its difference made visible. A picture "
            "that is black or holds NaN is named. Both batches need the same size, count and channels; alpha counts "
            "like a colour.",
            is_output_node=True,
            inputs=[
                io.Image.Input("reference", tooltip="Pictures of the original model."),
                io.Image.Input("candidate", tooltip="Pictures of the quantized model, in the same order."),
                io.Float.Input(
                    "amplify",
                    default=DEFAULT_AMPLIFY,
                    min=1.0,
                    max=100.0,
                    step=1.0,
                    optional=True,
                    advanced=True,
                    tooltip="How many times the difference is amplified in the heat map: at 8 an eighth of the range "
                    "has the brightest colour.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="picture",
                    tooltip="The worst pair: reference, candidate, largest difference of any channel.",
                ),
                io.Image.Output(
                    display_name="flicker",
                    tooltip="Reference 1, candidate 1, reference 2, candidate 2 ..., full size: flip through them in "
                    "Preview Image, or save them as an animation of 2 frames a second.",
                ),
                io.String.Output(display_name="report", tooltip="Means, verdict, and a line for each picture."),
                io.Float.Output(display_name="psnr", tooltip="Mean over the pictures in dB; 100 where equal."),
                io.Float.Output(display_name="ssim", tooltip="Mean over the pictures; 1 where equal."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, reference: torch.Tensor, candidate: torch.Tensor, amplify: float = DEFAULT_AMPLIFY
    ) -> io.NodeOutput:
        """Compare, and show the worst pair and the verdict on the node."""
        node_id = cls.hidden.unique_id
        comparison = compare(reference, candidate, node_progress(node_id))
        worst = comparison.worst.number - 1
        picture = side_by_side(reference[worst], candidate[worst], amplify, comparison.caption)
        show_text(comparison.summary, node_id)
        outputs = (picture, flicker(reference, candidate), comparison.report, comparison.psnr, comparison.ssim)
        return io.NodeOutput(*outputs, ui=ui.PreviewImage(picture, cls=cls))
