"""Would this file open? Checked through the loader's own code on the meta device: no weights are copied."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import comfy.model_detection
import comfy.model_management
import comfy.utils
import torch

from ...hswq_core.errors import FileError
from ...hswq_core.files.checkpoint import FileSource
from ...hswq_core.plan.formats import FileFormat, usable
from ...hswq_core.plan.plan import QUANTIZE, Plan
from ..comfyui.layers import weight_of
from ..comfyui.tensors import is_quantized
from ..devices import model_device
from ..model import layer_modules
from .keys import key_prefix, normalize_keys
from .open import operations_for
from .options import Opening

if TYPE_CHECKING:
    from ..comfyui.types import BaseModel, StateDict

SMALL_BYTES = 64 * 1024


def verify_file(path: Path, plan: Plan, file_format: FileFormat) -> None:
    """Raise FileError unless every layer of ``plan`` loads as planned in the loader the format is meant for.

    V1 and comfy go through ComfyUI's stock detection, operations and load; V2 through HSWQ Loader's.
    No missing or unexpected key, no wrong shape, every scaled layer a quantized tensor with a finite scale.
    """
    file = FileSource(path)
    state, metadata = _skeleton(file), dict(file.metadata)
    prefix = key_prefix(state)
    if file_format.own_loader:
        state = normalize_keys(state, prefix, path.name, metadata)
    else:
        state, metadata = comfy.utils.convert_old_quants(state, prefix, metadata=metadata)
    model = _on_meta(path, state, prefix, metadata, own=file_format.own_loader)
    modules = layer_modules(model.diffusion_model)
    for layer in plan.layers:
        if layer.action == QUANTIZE and layer.scaled:
            scale, input_scale = (state.get(f"{prefix}{layer.name}.{key}") for key in ("weight_scale", "input_scale"))
            _require_scaled(path, layer.name, weight_of(modules[layer.name]), scale)
            if layer.input_amax:
                _require_usable(path, layer.name, "input scale", input_scale)


def _skeleton(file: FileSource) -> StateDict:
    """The file's tensors, large ones without their data: detection goes by names, shapes and dtypes."""
    return {
        key: file.read(key) if info.nbytes <= SMALL_BYTES else torch.empty(info.shape, dtype=info.dtype, device="meta")
        for key, info in file.entries.items()
    }


def _dataless(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on the meta device; the uint8 markers must stay readable."""
    return tensor if tensor.dtype == torch.uint8 else tensor.to("meta")


def _on_meta(path: Path, state: StateDict, prefix: str, metadata: dict[str, str], own: bool) -> BaseModel:
    config = comfy.model_detection.model_config_from_unet(state, prefix, metadata=metadata)
    if config is None:
        raise _refused(path, "a model ComfyUI does not recognize")
    device = model_device()
    operations, storage = operations_for(state, prefix, Opening())
    if own:
        config.custom_operations = operations
    cast = comfy.model_management.unet_manual_cast(
        None if config.quant_config else storage, device, config.supported_inference_dtypes
    )
    config.set_inference_dtype(storage, cast)
    model = config.get_model(state, prefix, device=torch.device("meta"))
    weights = {key[len(prefix) :]: _dataless(tensor) for key, tensor in state.items() if key.startswith(prefix)}
    weights = config.process_unet_state_dict(weights)
    missing, unexpected = model.diffusion_model.load_state_dict(weights, strict=False)
    if missing or unexpected:
        raise _refused(path, f"missing keys {missing[:3]}, unexpected keys {unexpected[:3]}")
    return model


def _require_scaled(path: Path, name: str, weight: torch.Tensor, scale: torch.Tensor | None) -> None:
    if not is_quantized(weight):
        raise _refused(path, f"layer {name} loaded without its scale")
    _require_usable(path, name, "scale", scale)


def _require_usable(path: Path, name: str, what: str, scale: torch.Tensor | None) -> None:
    if scale is None or not bool(usable(scale).all()):
        raise _refused(path, f"layer {name} with {what} {None if scale is None else scale.tolist()}")


def _refused(path: Path, got: str) -> FileError:
    return FileError(
        f"Written file {path.name}, checked through its loader",
        got=got,
        expected="a file that opens without missing or unexpected keys",
        remedy="Nothing was saved. This is a bug of this pack; please report it with the model's name.",
    )
