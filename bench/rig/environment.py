"""The environment variables of every Python process that the rig starts."""

from __future__ import annotations

import os
from collections.abc import Mapping

from rig.pack import ROOT
from rig.tree import cache_folder


def child_environment(threads: int | None = None, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Our environment plus: offline model hubs, bytecode in the cache folder, UTF-8, `threads` for torch."""
    own = {
        # Bytecode goes neither into the pack nor into the ComfyUI tree. But it must be cached somewhere,
        # since recompiling torch would cost every start 8 s.
        "PYTHONPYCACHEPREFIX": str(cache_folder() / "pycache"),
        "PYTHONDONTWRITEBYTECODE": "",
        "PYTHONUNBUFFERED": "1",
        "HSWQ_BENCH": str(ROOT / "bench"),  # for the test nodes, whose folder may be a copy
        "PYTHONUTF8": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
    }
    if threads is not None:
        own["OMP_NUM_THREADS"] = str(threads)
    return {**os.environ, **own, **(extra or {})}
