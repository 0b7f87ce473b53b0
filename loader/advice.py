"""What is said about likely mistakes: before the work begins, or in the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.model_management
from comfy.patcher_extension import WrappersMP

from ..hswq_core import SessionError
from ..hswq_core.split import ENOUGH_PROMPTS, count_prompts
from ..hswq_core.states import State
from .calibrate import wrapper_key

ON_CPU = "No GPU found: model_aware runs the model on the CPU, hours for a large one; hswq takes minutes"


def require_recorded(model: Any, path: Path) -> None:
    """Raise SessionError if ``model`` comes from a Calibration node that has not seen it draw anything yet.

    Args:
        model: the MODEL at the Converter.
        path: of the session; a file that is there, whoever made it, is enough.
    """
    if not path.exists() and model.wrappers.get(WrappersMP.OUTER_SAMPLE, {}).get(wrapper_key(path)):
        raise SessionError(
            f"Session {path.stem}",
            got="a model that comes from HSWQ Calibration but has drawn nothing yet",
            expected="a picture drawn with it before it is converted",
            remedy="Connect the model output of HSWQ Calibration to the sampler too, and the decoded picture to the "
            "Converter's 'after', so that the picture comes first.",
        )


def runs_on_cpu() -> bool:
    """Whether ComfyUI found no GPU."""
    return bool(comfy.model_management.get_torch_device().type == "cpu")


def merged_notes(model: Any) -> list[str]:
    """For the report: a LoRA that is in the file must not be loaded a second time."""
    if not model.patches:
        return []
    return [
        f"LoRAs or merges of the connected model are in the file ({len(model.patches)} tensors): do not add them "
        "again. For a file without them connect the model before the LoRA loader."
    ]


def prompts_notes(states: list[State]) -> list[str]:
    """For the report of model_aware: a session of few prompts."""
    prompts = count_prompts(states)
    if prompts >= ENOUGH_PROMPTS:
        return []
    count = "one prompt" if prompts == 1 else f"{prompts} prompts"
    return [
        f"The session shows {count}, and pictures of others were drawn to make up for it. With {ENOUGH_PROMPTS} or "
        "more of your own the file gets better: generate on, then convert again."
    ]
