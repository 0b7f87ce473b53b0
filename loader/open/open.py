"""Open V1, V2, comfy and legacy FP8 files with the FP8 weights kept in RAM and VRAM, convolutions too."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import comfy.model_detection
import comfy.model_management
import comfy.sd
import comfy.utils
import torch

from ...hswq_core.errors import FileError
from ...hswq_core.files.checkpoint import readable
from ...hswq_core.files.tensor_header import read_records
from ...hswq_core.model.layer import weight_key
from ...hswq_core.quant.grid import FLOAT8_E4M3FN
from ...hswq_core.quant.schemes.scheme import SCALE
from ..comfyui.patchers import reopened_by
from ..devices import model_device
from ..stamp import Stamp
from .keys import key_prefix, normalize_keys
from .lora import with_lora_mode
from .ops import Float8Operations, float8_operations
from .options import AUTO, DTYPES, Opening

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ..comfyui.types import CLIP, VAE, ModelPatcher, StateDict

log = logging.getLogger(__name__)
SIXTEEN_BITS = (torch.float16, torch.bfloat16)


def open_checkpoint(
    path: Path, opening: Opening, embedding_directory: Sequence[str] | None = None
) -> tuple[ModelPatcher, CLIP | None, VAE | None]:
    """(MODEL, CLIP, VAE) of a checkpoint; text encoder and VAE load as in the stock loader.

    Raises:
        FileError: unreadable, not FP8, an unknown model, or a wrong scale.
    """
    stamp = Stamp.of(path)
    file = _prepared(path, opening)
    model, clip, vae, _ = (
        comfy.sd.load_state_dict_guess_config(
            file.state, embedding_directory=embedding_directory, model_options=file.options, metadata=file.metadata
        )
        or (None,) * 4
    )
    return file.finished(model, opening, (reload_checkpoint, stamp)), clip, vae


def reload_checkpoint(path: str, opening: Opening, stamp: Stamp, disable_dynamic: bool = False) -> ModelPatcher:
    """Reload the MODEL of a checkpoint: ComfyUI asks for that for torch.compile, hooks and several GPUs."""
    stamp.require(Path(path))
    file = _prepared(Path(path), opening)
    model = comfy.sd.load_state_dict_guess_config(
        file.state,
        output_vae=False,
        output_clip=False,
        model_options=file.options,
        metadata=file.metadata,
        disable_dynamic=disable_dynamic,
    )[0]
    return file.finished(model, opening, (reload_checkpoint, stamp))


def open_diffusion_model(path: Path, opening: Opening) -> ModelPatcher:
    """MODEL of a diffusion model file (or of the diffusion model in a checkpoint).

    Raises:
        FileError: see ``open_checkpoint``.
    """
    return reload_diffusion_model(str(path), opening, Stamp.of(path))


def reload_diffusion_model(path: str, opening: Opening, stamp: Stamp, disable_dynamic: bool = False) -> ModelPatcher:
    """The MODEL of a diffusion model file, which must still be the file of ``stamp``."""
    stamp.require(Path(path))
    file = _prepared(Path(path), opening)
    model = comfy.sd.load_diffusion_model_state_dict(
        file.state, model_options=file.options, metadata=file.metadata, disable_dynamic=disable_dynamic
    )
    return file.finished(model, opening, (reload_diffusion_model, stamp))


def operations_for(state: StateDict, prefix: str, opening: Opening) -> tuple[type[Float8Operations], torch.dtype]:
    """(operations class, storage dtype of the layers that are not FP8: the file's own most frequent 16-bit type)."""
    sizes: Counter[torch.dtype] = Counter()
    for key, tensor in state.items():
        if tensor.dtype in SIXTEEN_BITS and key.startswith(prefix):
            sizes[tensor.dtype] += tensor.numel()
    storage = max(sizes, key=lambda dtype: sizes[dtype], default=None) or _preferred(state, prefix)
    device = model_device()
    multiply = opening.fp8_matmul and comfy.model_management.supports_fp8_compute(device)
    return float8_operations(storage, multiply=multiply), storage


def _preferred(state: StateDict, prefix: str) -> torch.dtype:
    """What ComfyUI computes the model in, for a file without any 16-bit tensor."""
    config = comfy.model_detection.model_config_from_unet(state, prefix)
    return config.supported_inference_dtypes[0] if config else torch.float16


class Options(TypedDict):
    """The ComfyUI model options that the loader sets."""

    custom_operations: type[Float8Operations]
    dtype: torch.dtype


@dataclass(frozen=True)
class _Prepared:
    """A file, read and checked, on its way into ComfyUI.

    Attributes:
        state: state dict with normalized keys.
        scaled: keys of the FP8 weights that have a scale.
        options: ComfyUI's model options.
    """

    path: Path
    state: StateDict
    metadata: dict[str, str] | None
    scaled: list[str]
    options: Options

    def finished(
        self, opened: ModelPatcher | None, opening: Opening, again: tuple[Callable[..., ModelPatcher], Stamp]
    ) -> ModelPatcher:
        """The opened MODEL with its options applied, and ready to be reloaded."""
        model = self._checked(opened)
        reload, stamp = again
        reopened_by(model, reload, str(self.path), opening, stamp)
        if opening.dequantize_dtype != AUTO:
            model.set_model_compute_dtype(DTYPES[opening.dequantize_dtype])
        loaded = self.options["custom_operations"].loaded
        log.info("HSWQ: %s: %d layers in FP8, %d in 16 bits", self.path.name, loaded.float8, loaded.plain)
        return with_lora_mode(model, opening.lora)

    def _checked(self, model: ModelPatcher | None) -> ModelPatcher:
        """The model, once every scale is known to have arrived: a weight without its scale draws a black picture."""
        taken = self.options["custom_operations"].loaded.scaled
        if model is None or (not taken and self.scaled):
            raise FileError(
                f"File {self.path.name}",
                got="a model this ComfyUI does not recognize",
                expected="a checkpoint for HSWQ Loader, a diffusion model for HSWQ Diffusion Model Loader",
                remedy="Use the other one of the two loaders, or update ComfyUI.",
            )
        if len(taken) < len(self.scaled):
            lost = next(key for key in self.scaled if not key.endswith(tuple(f"{name}weight" for name in taken)))
            raise FileError(
                f"File {self.path.name}, tensor {lost}",
                got="a scale on a layer that is neither Linear nor Conv2d",
                expected=f"{len(self.scaled)} scaled layers, of which {len(taken)} can be opened",
                remedy="Convert the model with HSWQ Converter, which leaves such layers in 16 bits.",
            )
        return model


def _prepared(path: Path, opening: Opening) -> _Prepared:
    with readable(path):
        read_records(path)  # ComfyUI does not always notice faults, and the library trusts any header
        state, metadata = comfy.utils.load_torch_file(str(path), return_metadata=True)
    prefix = key_prefix(state)
    state = normalize_keys(state, prefix, path.name, metadata)
    if not any(key.startswith(prefix) and t.dtype == FLOAT8_E4M3FN.dtype for key, t in state.items()):
        raise FileError(
            f"File {path.name}",
            got="no float8_e4m3fn weight in its diffusion model",
            expected="a file converted to v1, v2 or comfy",
            remedy="Open it with ComfyUI's own loader.",
        )
    suffix = f".{SCALE}"
    scaled = [weight_key(key[: -len(suffix)]) for key in state if key.startswith(prefix) and key.endswith(suffix)]
    operations, storage = operations_for(state, prefix, opening)
    return _Prepared(path, state, metadata, scaled, {"custom_operations": operations, "dtype": storage})
