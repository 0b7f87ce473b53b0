"""The three reference architectures: one row each, and their registration with ComfyUI's model detection.

ComfyUI recognizes SDXL by its full width and Z-Image by dim 3840. So the small ones are registered as additional
rows of ``comfy.supported_models``, subclasses of the real rows: detection, loading, sampling and saving are
ComfyUI's own. The Flux layout needs no row; every ComfyUI opens it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from reference_models.captions import WIDTH
from reference_models.latents import wavelet_format
from reference_models.pictures import CHANNELS
from reference_models.start import start_as_identity

FOLDER = Path(__file__).resolve().parents[2] / "tests" / "data" / "reference_models"
SDXL_SIZE_EMBEDDINGS = 6 * 256


@dataclass(frozen=True)
class Reference:
    """One reference model.

    Attributes:
        name: name of its file.
        layout: name for people.
        config: arguments of the diffusion model's class, as ComfyUI detects them.
        row: () -> class of ``comfy.supported_models``; imports comfy.
        zeros: name suffixes of layers that start at zero, so that each block starts as the identity.
        on_disk: renames a parameter for the file, where published files name it differently.
        sampler, scheduler, steps, cfg: the family's usual settings.
        guidance: embedded guidance, or None.
        pooled: whether the family has a pooled text vector.
        start: further initialization of the fresh model.
        weighted: whether the training loss is weighted by 1 + sigma².
    """

    name: str
    layout: str
    config: dict[str, Any]
    row: Callable[[], type]
    zeros: tuple[str, ...]
    sampler: str = "euler"
    scheduler: str = "simple"
    steps: int = 20
    cfg: float = 1.0
    guidance: float | None = None
    pooled: bool = True
    start: Callable[[Any], None] = lambda _model: None
    weighted: bool = False
    on_disk: Callable[[str], str] = field(default=lambda key: key)

    @property
    def file(self) -> Path:
        """Where the trained weights are, FP16."""
        return FOLDER / f"{self.name}.safetensors"


def _sdxl_row() -> type:
    import comfy.supported_models

    class ReferenceSDXL(comfy.supported_models.SDXL):  # type: ignore[misc]
        unet_config: ClassVar[dict[str, Any]] = {
            key: SDXL[key] for key in ("model_channels", "context_dim", "adm_in_channels")
        }
        unet_extra_config: ClassVar[dict[str, Any]] = {"num_heads": -1, "num_head_channels": SDXL["num_head_channels"]}
        latent_format = wavelet_format()

        def inpaint_model(self) -> bool:  # 16 channels here do not mean a mask and a masked picture
            return False

    return ReferenceSDXL


def _flux_row() -> type:
    import comfy.supported_models

    row: type = comfy.supported_models.Flux
    return row


def _zimage_row() -> type:
    import comfy.supported_models

    class ReferenceZImage(comfy.supported_models.ZImage):  # type: ignore[misc]
        unet_config: ClassVar[dict[str, Any]] = {"image_model": "lumina2", "dim": ZIMAGE["dim"]}
        unet_extra_config: ClassVar[dict[str, Any]] = {key: ZIMAGE[key] for key in _UNDETECTED}

    return ReferenceZImage


SDXL: dict[str, Any] = {
    "image_size": 32,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    # 96 = three channels per GroupNorm group, see start.py. The rest is what fits into 20 MB.
    "model_channels": 96,
    "num_res_blocks": [1, 1, 1],
    "channel_mult": [1, 1, 2],
    "transformer_depth": [0, 1, 1],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [0, 0, 1, 0, 0, 0],
    "num_heads": -1,
    "num_head_channels": 32,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": True,
    "legacy": False,
    "context_dim": WIDTH,
    "num_classes": "sequential",
    "adm_in_channels": WIDTH + SDXL_SIZE_EMBEDDINGS,
}
FLUX: dict[str, Any] = {
    "image_model": "flux",
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "patch_size": 2,
    "vec_in_dim": WIDTH,
    "context_in_dim": WIDTH,
    "hidden_size": 256,
    "mlp_ratio": 4.0,
    "num_heads": 2,
    "depth": 2,
    "depth_single_blocks": 4,
    "axes_dim": [16, 56, 56],
    "theta": 10000,
    "qkv_bias": True,
    "guidance_embed": True,
    "txt_ids_dims": [],
}
ZIMAGE: dict[str, Any] = {
    "image_model": "lumina2",
    "in_channels": CHANNELS,
    "patch_size": 2,
    "dim": 256,
    "n_layers": 4,
    "n_heads": 4,
    "n_kv_heads": 4,
    "axes_dims": [16, 24, 24],
    "axes_lens": [1536, 512, 512],
    "rope_theta": 256.0,
    "ffn_dim_multiplier": 8.0 / 3.0,
    "qk_norm": True,
    "cap_feat_dim": WIDTH,
    "z_image_modulation": True,
    "time_scale": 1000.0,
    "pad_tokens_multiple": 32,
}
# ComfyUI knows these for dim 3840 only, so the row must state them.
_UNDETECTED = (
    "n_heads",
    "n_kv_heads",
    "axes_dims",
    "axes_lens",
    "rope_theta",
    "ffn_dim_multiplier",
    "z_image_modulation",
    "time_scale",
    "pad_tokens_multiple",
)

REFERENCES = {
    reference.name: reference
    for reference in (
        Reference(
            "sdxl",
            "SDXL UNet",
            SDXL,
            _sdxl_row,
            ("out.2", "out_layers.3", "proj_out"),
            scheduler="normal",
            cfg=5.0,
            start=start_as_identity,
            weighted=True,
        ),
        Reference(
            "flux",
            "Flux",
            FLUX,
            _flux_row,
            ("_mod.lin", "modulation.lin", "final_layer.linear", "final_layer.adaLN_modulation.1"),
            guidance=3.5,
            on_disk=lambda key: key.replace("_norm.weight", "_norm.scale"),
        ),
        Reference(
            "zimage", "Z-Image NextDiT", ZIMAGE, _zimage_row, ("adaLN_modulation.0", "final_layer.linear"), pooled=False
        ),
    )
}


def register() -> None:
    """Let this process's ComfyUI recognize the reference models; does nothing when called again."""
    import comfy.supported_models

    known = comfy.supported_models.models
    for reference in REFERENCES.values():
        row = reference.row()
        if all(row.__name__ != other.__name__ for other in known):
            known.insert(0, row)


def build(reference: Reference, operations: Any, device: Any) -> Any:
    """ComfyUI's BaseModel with a fresh float32 diffusion model, built from the layers of ``operations``."""
    import torch

    config = reference.row()(dict(reference.config))
    config.custom_operations = operations
    config.set_inference_dtype(torch.float32, None)
    return config.get_model({}, "", device=device)
