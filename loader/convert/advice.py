"""Notes on likely mistakes, shown before the work begins or in the report."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...hswq_core.calibration.split import ENOUGH_PROMPTS, count_prompts
from ...hswq_core.calibration.states import State

if TYPE_CHECKING:
    from ..comfyui.types import ModelPatcher

ON_CPU = "No GPU found: model_aware runs the model on the CPU, hours for a large one; hswq takes minutes"


def merged_notes(model: ModelPatcher) -> list[str]:
    """For the report: a LoRA that is in the file must not be loaded a second time."""
    if not model.patches:
        return []
    return [
        f"LoRAs or merges of the connected model are in the file ({len(model.patches)} tensors): do not add them "
        "again. For a file without them connect the model before the LoRA loader."
    ]


def prompts_notes(states: list[State]) -> list[str]:
    """For the report of model_aware: the session has few prompts."""
    prompts = count_prompts(states)
    if prompts >= ENOUGH_PROMPTS:
        return []
    count = "one prompt" if prompts == 1 else f"{prompts} prompts"
    return [
        f"The session shows {count}, and pictures of others were drawn to make up for it. With {ENOUGH_PROMPTS} or "
        "more of your own the file gets better: generate on, then convert again."
    ]
