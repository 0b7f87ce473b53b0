"""HSWQ Loader and HSWQ Diffusion Model Loader: FP8 files with the FP8 kept in memory."""

from __future__ import annotations

from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ..loader.open import open_checkpoint, open_diffusion_model

OPENS = "Opens v1, v2 and comfy files. Linear and convolution weights stay FP8 in memory, kept layers stay FP16."


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
            inputs=[
                io.Combo.Input(
                    "ckpt_name",
                    options=folder_paths.get_filename_list("checkpoints"),
                    tooltip="A converted checkpoint.",
                )
            ],
            outputs=[io.Model.Output(), io.Clip.Output(), io.Vae.Output()],
        )

    @classmethod
    def execute(cls, ckpt_name: str) -> io.NodeOutput:
        """Load the file."""
        path = Path(folder_paths.get_full_path_or_raise("checkpoints", ckpt_name))
        return io.NodeOutput(*open_checkpoint(path, folder_paths.get_folder_paths("embeddings")))


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
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=folder_paths.get_filename_list("diffusion_models"),
                    tooltip="A converted diffusion model.",
                )
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model_name: str) -> io.NodeOutput:
        """Load the file."""
        path = Path(folder_paths.get_full_path_or_raise("diffusion_models", model_name))
        return io.NodeOutput(open_diffusion_model(path))
