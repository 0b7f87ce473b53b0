"""Where this repository is, and how Python code outside ComfyUI imports the pack."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
ALIAS = "hswq"


def alias() -> ModuleType:
    """Make `hswq.hswq_core`, `hswq.loader`, `hswq.nodes` importable; calling it again is harmless.

    The package is bare: its path is the repository root, but the root's `__init__.py`,
    which is for ComfyUI, does not run.
    """
    if ALIAS not in sys.modules:
        spec = ModuleSpec(ALIAS, loader=None, is_package=True)
        spec.submodule_search_locations = [str(ROOT)]
        sys.modules[ALIAS] = module_from_spec(spec)
    return sys.modules[ALIAS]
