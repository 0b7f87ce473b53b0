"""Exact LoRAs: added to the dequantized weight at each call, never rounded to FP8.

ComfyUI patches a resident weight once: dequantize, add, requantize with stochastic rounding. In each layer the LoRA
touches, that replaces the file's careful rounding (compensated codes, a clipped scale) with noise. Here the weight
stays as it is in the file, and the low-rank change is added to what is dequantized anyway, as ComfyUI itself does for
weights it streams from RAM.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, cast

import comfy.lora
import comfy.utils
import torch
from comfy.hooks import EnumHookMode
from comfy.quant_ops import QuantizedTensor

from ..comfyui.adapters import factors_of, is_low_rank, is_lowvram_patch
from ..comfyui.layers import (
    drop_lowvram_function,
    is_loaded,
    set_weight_functions,
    weight_functions,
    weight_of,
)
from ..comfyui.patchers import PatcherBase, count_as_loaded, mixed

if TYPE_CHECKING:
    from comfy.weight_adapter import LoRAAdapter

    from ..comfyui.types import ModelPatcher, Patch, StateDict, WeightFunction

from ...hswq_core.model.layer import WEIGHT

EXACT, STOCK = "exact", "stock"
LORA_MODES = (EXACT, STOCK)


class ExactPatch:
    """A weight function of a layer: adds its LoRAs, whose factors are on the layer's device.

    Args:
        key: of the weight in the model.
        patches: ComfyUI's patches of that key, (strength, value, strength of the model, offset, function) each.
    """

    def __init__(self, key: str, patches: list[Patch]) -> None:
        self.key = key
        self.source = patches
        self._patches = patches

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        """weight + Σ strength · change, in the weight's dtype; in place, since ``weight`` is a fresh tensor."""
        if weight.is_contiguous() and all(_is_low_rank(patch) for patch in self._patches):
            for strength, adapter, *_ in self._patches:
                _add_low_rank(weight, strength, adapter)
            return weight
        patched: torch.Tensor = comfy.lora.calculate_weight(
            self._patches, weight, self.key, intermediate_dtype=weight.dtype
        )
        return patched

    def move_to(self, device: torch.device | None) -> int:
        """Copy the factors to ``device``, once; returns their bytes there (ComfyUI's rule for weight functions)."""
        sizes: list[int] = []
        self._patches = [(patch[0], _moved(patch[1], device, sizes), *patch[2:]) for patch in self.source]
        return sum(sizes)


def _is_low_rank(patch: Patch) -> bool:
    """Whether a patch adds up @ down to the whole weight and does nothing else."""
    _, value, strength_model, offset, function = patch
    return is_low_rank(value) and offset is None and function is None and strength_model == 1.0


def _add_low_rank(weight: torch.Tensor, strength: float, adapter: LoRAAdapter) -> None:
    """weight += strength · alpha / rank · up @ down in one pass; ComfyUI's own formula takes four."""
    up, down, alpha = factors_of(adapter)
    scale = strength if alpha is None else strength * alpha / down.shape[0]
    up, down = (part.to(weight.device, weight.dtype).flatten(1) for part in (up, down))
    weight.flatten(1).addmm_(up, down, alpha=scale)


def _moved(value: Any, device: torch.device | None, sizes: list[int]) -> Any:
    """An adapter, or ComfyUI's tuples and lists of them, with every tensor on ``device``; bytes go to ``sizes``."""
    if isinstance(value, torch.Tensor):
        sizes.append(value.nbytes)
        return value.to(device)
    if isinstance(value, tuple | list):
        return type(value)(_moved(item, device, sizes) for item in value)
    if hasattr(value, "weights"):
        adapter = copy.copy(value)
        adapter.weights = _moved(value.weights, device, sizes)
        return adapter
    return value


class Float8Patcher(PatcherBase):
    """Mixed into a ModelPatcher class: what every model of HSWQ Loader needs beyond the stock one.

    Attributes:
        mixin: this class or the one below, whichever was mixed in.
    """

    mixin: type[Float8Patcher]

    @property
    def hook_mode(self) -> EnumHookMode:
        """LoRAs hooked to prompts are patched at each switch.

        ComfyUI's other mode caches the patched weights in 16 bits, twice the model's size, and cannot copy them back
        into FP8 ones.
        """
        return EnumHookMode.MinVram

    @hook_mode.setter
    def hook_mode(self, _mode: EnumHookMode) -> None: ...

    def unpatch_hooks(self, whitelist_keys_set: set[str] | None = None) -> None:
        """Restore FP8 weights whole: ComfyUI copies the codes into the patched tensor, which would keep its scale."""
        held = {key: backup for key, backup in self.hook_backup.items() if isinstance(backup[0], QuantizedTensor)}
        super().unpatch_hooks(whitelist_keys_set)
        for key in held.keys() - self.hook_backup.keys():
            weight, device = held[key]
            comfy.utils.set_attr_param(self.model, key, weight.to(device))

    def clone(self, *args: Any, **kwargs: Any) -> ModelPatcher:
        """Clones keep the mixin, even where ComfyUI turns a dynamic ModelPatcher into a plain one."""
        return _mixed(super().clone(*args, **kwargs), self.mixin)


class ExactLora(Float8Patcher):
    """FP8 weights get an ExactPatch instead of being patched in place.

    Model merges, whose "change" is a whole other model, are left to ComfyUI; and what Save nodes write has its LoRAs
    merged and rounded to FP8 as in ComfyUI.
    """

    def patch_weight_to_device(  # type: ignore[override] # force_cast is not in every ComfyUI
        self,
        key: str,
        device_to: torch.device | None = None,
        inplace_update: bool = False,
        return_weight: bool = False,
        **rest: Any,
    ) -> torch.Tensor | None:
        """Does nothing for a weight that is patched at each call."""
        if not (return_weight or rest.get("force_cast")) and self._is_exact(key):
            return None
        return super().patch_weight_to_device(key, device_to, inplace_update, return_weight, **rest)

    def load(self, device_to: torch.device | None = None, *args: Any, **kwargs: Any) -> None:
        """Load, then attach what is added at each call."""
        super().load(device_to, *args, **kwargs)
        self._attach()

    def partially_unload(self, *args: Any, **kwargs: Any) -> int:
        """Offload some; ComfyUI appends its own patch to what it offloads, which must not be applied twice."""
        freed = super().partially_unload(*args, **kwargs)
        self._attach()
        return freed

    def unpatch_model(self, device_to: torch.device | None = None, unpatch_weights: bool = True) -> None:
        """Remove our patches too, whichever clone attached them."""
        if unpatch_weights:
            for module in self.model.modules():
                if any(isinstance(function, ExactPatch) for function in weight_functions(module)):
                    set_weight_functions(module, _others(module))
        return super().unpatch_model(device_to, unpatch_weights)

    def state_dict_for_saving(self, *args: Any, **kwargs: Any) -> StateDict:
        """For Save nodes: resident weights with their LoRAs, rounded to FP8; ComfyUI patches the others one by one."""
        held = {key: weight_of(self._module(key)) for key in self.patches if self._is_resident(key)}
        try:
            for key in held:
                patched = cast(torch.Tensor, self.patch_weight_to_device(key, self.load_device, return_weight=True))
                self._module(key).weight = torch.nn.Parameter(patched, requires_grad=False)
            return super().state_dict_for_saving(*args, **kwargs)
        finally:
            for key, weight in held.items():
                self._module(key).weight = weight

    def _attach(self) -> None:
        """One ExactPatch for each weight that has LoRAs and was not patched in place."""
        for key, patches in self.patches.items():
            if not self._is_exact(key) or key in self.backup:
                continue
            module = self._module(key)
            known = [f for f in weight_functions(module) if isinstance(f, ExactPatch) and f.source is patches]
            if not known:
                known = [ExactPatch(key, patches)]
                count_as_loaded(self, known[0].move_to(self.load_device))
            set_weight_functions(module, [known[0], *_others(module)])
            drop_lowvram_function(module)  # dynamic VRAM would round to FP8 after it

    def _is_exact(self, key: str) -> bool:
        """Whether ``key`` is an FP8 weight of ours, and none of its patches holds another model's weight."""
        patches = self.patches.get(key)
        if not patches or not key.endswith(WEIGHT) or any(_is_model(patch[1]) for patch in patches):
            return False
        return getattr(self._module(key), "layout_type", None) is not None

    def _is_resident(self, key: str) -> bool:
        return self._is_exact(key) and is_loaded(self._module(key))

    def _module(self, key: str) -> torch.nn.Module:
        return comfy.utils.get_attr(self.model, key[: -len(WEIGHT)])


def _is_model(value: object) -> bool:
    """Whether a patch holds another model's weight: merging nodes give a list, "model as LoRA" says so."""
    return isinstance(value, list) or (isinstance(value, tuple) and value[0] == "model_as_lora")


def _others(module: torch.nn.Module) -> list[WeightFunction]:
    """A layer's weight functions that are not LoRAs."""
    return [f for f in weight_functions(module) if not isinstance(f, ExactPatch) and not is_lowvram_patch(f)]


def with_lora_mode(patcher: ModelPatcher, mode: str) -> ModelPatcher:
    """The same MODEL with LoRAs added as ``mode`` says, one of ``LORA_MODES``; its clones keep that."""
    return _mixed(patcher, ExactLora if mode == EXACT else Float8Patcher)


def _mixed(patcher: ModelPatcher, mixin: type[Float8Patcher]) -> ModelPatcher:
    return patcher if isinstance(patcher, Float8Patcher) else mixed(patcher, mixin)
