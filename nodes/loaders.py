"""HSWQ Loader and HSWQ Diffusion Model Loader: FP8 files with the FP8 kept in memory."""

from __future__ import annotations

from dataclasses import astuple
from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io

from ..loader.open.lora import EXACT, LORA_MODES
from ..loader.open.open import open_checkpoint, open_diffusion_model
from ..loader.open.options import AUTO, DTYPES, Opening
from ..loader.stamp import Stamp

OPENS = "Opens v1, v2 and comfy files. Linear and convolution weights stay FP8 in memory, kept layers stay FP16."


def options() -> list[io.Input]:
    """Inputs of both loaders."""
    return [
        io.Combo.Input(
            "lora",
            options=list(LORA_MODES),
            default=EXACT,
            optional=True,
            tooltip="exact: LoRAs are added to the dequantized weight at each call, so that their layers stay as good "
            "as the file; costs a little time for each LoRA. stock: as ComfyUI's loaders do it, patched weights are "
            "rounded to FP8 anew, at random; no time, but the file's careful rounding is lost in those layers.",
        ),
        io.Combo.Input(
            "dequantize_dtype",
            options=[AUTO, *DTYPES],
            default=AUTO,
            optional=True,
            advanced=True,
            tooltip="What FP8 weights become for each call, and what the model computes in. auto: ComfyUI's choice for "
            "the model and the device.",
        ),
        io.Boolean.Input(
            "fp8_matmul",
            default=True,
            optional=True,
            advanced=True,
            tooltip="Multiply in FP8 in the layers a comfy file was measured and marked for (fast_matmul), on cards "
            "with FP8 compute. Off: every layer multiplies in the model's own dtype.",
        ),
    ]


class HSWQLoader(io.ComfyNode):
    """Checkpoint to MODEL, CLIP, VAE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="HSWQLoader",
            display_name="HSWQ Loader",
            category="HSWQ",
            description=f"{OPENS} Text encoder and VAE load as in Load Checkpoint.",
            search_aliases=["load fp8", "fp8 checkpoint", "quantized checkpoint", "load checkpoint"],
            inputs=[
                io.Combo.Input(
                    "ckpt_name",
                    options=folder_paths.get_filename_list("checkpoints"),
                    tooltip="A converted checkpoint.",
                ),
                *options(),
            ],
            outputs=[
                io.Model.Output(tooltip="The diffusion model, FP8 in memory; for samplers, LoRA loaders and patches."),
                io.Clip.Output(tooltip="The checkpoint's text encoder, for prompts."),
                io.Vae.Output(tooltip="The checkpoint's VAE, for latents to pictures and back."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, ckpt_name: str | None, **_: object) -> tuple[int, ...]:
        """A file converted again under the same name is opened again."""
        return _stamp("checkpoints", ckpt_name)

    @classmethod
    def execute(cls, ckpt_name: str, **options: Any) -> io.NodeOutput:
        """Load the file."""
        path = Path(folder_paths.get_full_path_or_raise("checkpoints", ckpt_name))
        return io.NodeOutput(*open_checkpoint(path, Opening(**options), folder_paths.get_folder_paths("embeddings")))


class HSWQDiffusionModelLoader(io.ComfyNode):
    """Diffusion model file to MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="HSWQDiffusionModelLoader",
            display_name="HSWQ Diffusion Model Loader",
            category="HSWQ",
            description=OPENS,
            search_aliases=["load fp8", "fp8 unet", "quantized model", "load diffusion model"],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=folder_paths.get_filename_list("diffusion_models"),
                    tooltip="A converted diffusion model.",
                ),
                *options(),
            ],
            outputs=[
                io.Model.Output(tooltip="The diffusion model, FP8 in memory; for samplers, LoRA loaders and patches.")
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, model_name: str | None, **_: object) -> tuple[int, ...]:
        """A file converted again under the same name is opened again."""
        return _stamp("diffusion_models", model_name)

    @classmethod
    def execute(cls, model_name: str, **options: Any) -> io.NodeOutput:
        """Load the file."""
        path = Path(folder_paths.get_full_path_or_raise("diffusion_models", model_name))
        return io.NodeOutput(open_diffusion_model(path, Opening(**options)))


def _stamp(folder: str, name: str | None) -> tuple[int, ...]:
    """The file's stamp; empty if its name is linked and not known yet, or if it is gone, as loading it will say."""
    path = folder_paths.get_full_path(folder, name) if name else None
    return astuple(Stamp.of(Path(path))) if path else ()
