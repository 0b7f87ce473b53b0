"""hswq_core as a whole: importable anywhere, without side effects."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import hswq.hswq_core as core

ROOT = Path(core.__file__).resolve().parents[1]

IMPORT_EVERYTHING = """
import importlib, logging, pkgutil, sys
from types import ModuleType

BLOCKED = {"comfy", "comfy_api", "comfy_extras", "comfy_kitchen", "folder_paths", "nodes", "server", "execution"}

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise AssertionError(f"hswq_core imports {name}")

sys.meta_path.insert(0, Block())
root = ModuleType("hswq")
root.__path__ = [sys.argv[1]]
sys.modules["hswq"] = root
core = importlib.import_module("hswq.hswq_core")
for module in pkgutil.walk_packages(core.__path__, "hswq.hswq_core."):
    importlib.import_module(module.name)

import torch

assert not torch.cuda.is_initialized(), "importing hswq_core initialized CUDA"
assert torch.get_default_dtype() == torch.float32
assert not logging.getLogger().handlers, "importing hswq_core configured logging"
print(len([name for name in sys.modules if name.startswith("hswq.hswq_core.")]))
"""


def test_everything_imports_without_comfyui_cuda_or_output():
    run = subprocess.run(
        [sys.executable, "-c", IMPORT_EVERYTHING, str(ROOT)], capture_output=True, text=True, check=False, timeout=120
    )
    assert run.returncode == 0, run.stderr
    folder = Path(core.__file__).parent
    modules = [path for path in folder.rglob("*.py") if path != folder / "__init__.py"]
    assert run.stdout == f"{len(modules)}\n"
