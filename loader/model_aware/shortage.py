"""Out of memory in the middle of long work: a result to handle, not the end of the work."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import comfy.model_management

# torch's CPU allocator has no error class of its own: "DefaultCPUAllocator: can't allocate memory".
CPU_ALLOCATOR = "DefaultCPUAllocator"

T = TypeVar("T")


def attempted(make: Callable[[], T]) -> T | None:
    """What ``make`` returns; None if it ran out of memory, in which case all that it held is freed."""
    try:
        return make()
    except RuntimeError as error:  # torch.OutOfMemoryError is one too
        if not comfy.model_management.is_oom(error) and CPU_ALLOCATOR not in str(error):
            raise
    # After the handler: as long as the error lives, so do the frames of its traceback and their tensors.
    gc.collect()
    comfy.model_management.soft_empty_cache()
    return None
