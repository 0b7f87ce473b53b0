"""A MODEL (with CLIP and VAE) as a source of tensors for the writer: the original file wherever possible.

Keys, order, exact dtypes and metadata come from the file, weights changed by LoRAs and merges from the MODEL.
Where the file cannot be used (a diffusers layout, another file format, a model made in memory) the tensors
come from the MODEL under the names ComfyUI's own saver uses.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import comfy.lora
import torch

from ..hswq_core.errors import FileError, SettingError
from ..hswq_core.files.checkpoint import FileSource, TensorInfo
from ..hswq_core.model.fingerprint import Fingerprint, sample_weights
from ..hswq_core.model.layer import weight_key
from .comfyui.patchers import arguments_of
from .model import PARAMETER_PREFIX, ModelInfo, original
from .open.keys import key_prefix

if TYPE_CHECKING:
    from .comfyui.types import CLIP, VAE, KeyPatches, ModelPatcher

log = logging.getLogger(__name__)

Tensors = dict[str, tuple[TensorInfo, Callable[[], torch.Tensor]]]


class ModelSource:
    """TensorSource over a MODEL, optionally with CLIP and VAE.

    Attributes:
        prefix: of the diffusion model's keys.
        whole: whether CLIP and VAE are included (a checkpoint rather than a diffusion model).
    """

    def __init__(self, model: ModelPatcher, info: ModelInfo, clip: CLIP | None = None, vae: VAE | None = None) -> None:
        if (clip is None) != (vae is None):
            raise SettingError(
                "HSWQ Converter, clip and vae",
                got="only one of them connected",
                expected="both (a whole checkpoint) or neither (the diffusion model alone)",
                remedy="Connect both outputs of the checkpoint loader, or disconnect the one that is.",
            )
        self.whole = clip is not None
        file = _original_file(model, info)
        self.name = file.name if file else f"{type(model.model).__name__.lower()}_model"
        self.metadata: Mapping[str, str] = file.metadata if file else {}
        self.prefix, tensors = _diffusion_tensors(model, file)
        if clip is not None and vae is not None:
            tensors |= _encoder_tensors(model, clip, vae, file, self.prefix)
        if file and self.whole:
            tensors = {key: tensors[key] for key in [*file.entries, *tensors] if key in tensors}
        self._read = {key: read for key, (_, read) in tensors.items()}
        self.entries = {key: entry for key, (entry, _) in tensors.items()}

    def read(self, key: str) -> torch.Tensor:
        """The tensor, LoRAs merged, in the dtype of ``entries[key]``."""
        return self._read[key]().to(self.entries[key].dtype)


def file_of(patcher: ModelPatcher) -> Path | None:
    """The file a stock loader made ``patcher`` from, or None."""
    first = next(iter(arguments_of(patcher)), None)
    return Path(first) if isinstance(first, str) else None


def _original_file(model: ModelPatcher, info: ModelInfo) -> FileSource | None:
    """The model's file, if it holds every layer under the model's own names with the model's weights."""
    path = file_of(model)
    if path is None or path.suffix not in (".safetensors", ".sft") or not path.is_file():
        return None
    try:
        file = FileSource(path)
    except FileError as error:
        log.info("HSWQ: %s Taking the weights from memory.", error)
        return None
    prefix = key_prefix(file.entries)
    keys = {name: weight_key(name, prefix) for name in info.kinds}
    if any(key not in file.entries or file.entries[key].shape != info.empty[name].shape for name, key in keys.items()):
        log.info("HSWQ: %s names its layers differently; taking the weights from memory.", path.name)
        return None
    on_disk = Fingerprint(info.fingerprint.layout, sample_weights(keys, lambda name: file.read(keys[name])))
    info.fingerprint.require_same(on_disk, f"File {path.name}, changed since the model was loaded")
    return file


def _diffusion_tensors(model: ModelPatcher, file: FileSource | None) -> tuple[str, Tensors]:
    patches = model.get_key_patches(PARAMETER_PREFIX)
    if file is None:
        return _from_memory(model, patches)
    prefix = key_prefix(file.entries)
    changed = {f"{prefix}{key[len(PARAMETER_PREFIX) :]}": key for key in patches if len(patches[key]) > 1}
    tensors: Tensors = {}
    for key, entry in file.entries.items():
        if key in changed:
            tensors[key] = (entry, _merger(patches[changed.pop(key)], changed_key(key, prefix)))
        elif key.startswith(prefix):
            tensors[key] = (entry, partial(file.read, key))
    for key, parameter in changed.items():
        # ComfyUI renames some tensors on load (Flux norms); a patched one must not get lost that way.
        raise SettingError(
            f"Patched tensor {parameter}",
            got=f"no tensor {key} in {file.path.name}",
            expected="every patched tensor to be in the file",
            remedy="Save the patched model with a stock Save node and convert that file's model.",
        )
    return prefix, tensors


def changed_key(key: str, prefix: str) -> str:
    """The model's parameter name of a file key."""
    return f"{PARAMETER_PREFIX}{key[len(prefix) :]}"


def _merger(key_patch: KeyPatches, parameter: str) -> Callable[[], torch.Tensor]:
    def read() -> torch.Tensor:
        weight = original(key_patch).to(torch.float32, copy=True)
        merged: torch.Tensor = comfy.lora.calculate_weight(key_patch[1:], weight, parameter)
        return merged

    return read


def _from_memory(model: ModelPatcher, patches: dict[str, KeyPatches]) -> tuple[str, Tensors]:
    """The diffusion model's tensors, named as ComfyUI's own saver would."""
    names = {parameter[len(PARAMETER_PREFIX) :]: parameter for parameter in patches}
    saved = model.model.model_config.process_unet_state_dict_for_saving(dict(names))
    tensors: Tensors = {}
    for key, parameter in saved.items():
        patch = patches[parameter]
        weight = original(patch)
        read = _merger(patch, parameter) if len(patch) > 1 else partial(original, patch)
        tensors[key] = (TensorInfo(weight.dtype, tuple(weight.shape)), read)
    first, parameter = next(iter(saved.items()))
    return first[: len(first) - len(parameter) + len(PARAMETER_PREFIX)], tensors


def _encoder_tensors(model: ModelPatcher, clip: CLIP, vae: VAE, file: FileSource | None, prefix: str) -> Tensors:
    """CLIP and VAE: bit for bit from the same file if they come from it, else as ComfyUI saves them."""
    same = file is not None and all(file_of(p) == file.path and not p.patches for p in (clip.patcher, vae.patcher))
    if same and file is not None and prefix:
        others = {key: entry for key, entry in file.entries.items() if not key.startswith(prefix)}
        return {key: (entry, partial(file.read, key)) for key, entry in others.items()}
    clip.load_model()
    config = model.model.model_config
    clip_sd = clip.state_dict_for_saving() if hasattr(clip, "state_dict_for_saving") else clip.get_sd()
    state = {
        **config.process_clip_state_dict_for_saving(clip_sd),
        **config.process_vae_state_dict_for_saving(vae.get_sd()),
    }
    return {key: (TensorInfo(t.dtype, tuple(t.shape)), partial(_itself, t)) for key, t in state.items()}


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
