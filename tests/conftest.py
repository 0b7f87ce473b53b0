"""Fixtures of all tests: the pack under the name `hswq`, small models, a real ComfyUI."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

TESTS = Path(__file__).resolve().parent
BENCH = TESTS.parent / "bench"
sys.path.insert(0, str(BENCH))

from rig import pack, tiny  # noqa: E402
from rig.server import ComfyServer  # noqa: E402

pack.alias()
TESTNODES = BENCH / "rig" / "testnodes"
QUICK = ("bench", "core", "figures")
# Two cores, as the smallest machine has that the suite must pass on, among xdist's workers: more threads than cores
# slow each other down badly.
THREADS = int(os.environ.get("HSWQ_THREADS") or max(1, 2 // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))
torch.set_num_threads(THREADS)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Folders of quick files last: then two workers end at about the same time."""
    items.sort(key=lambda item: item.path.relative_to(TESTS).parts[0] in QUICK)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def threads() -> int:
    """How many a server or a process of a test may have."""
    return THREADS


class Models:
    """Puts the rig's small models into a server, each when a test first asks for it."""

    def __init__(self, server: ComfyServer) -> None:
        self._server = server

    def sd15(self) -> str:
        return self._add("checkpoints", tiny.make("sd15-small"), "sd15-small.safetensors")

    def sdxl(self) -> str:
        return self._add("checkpoints", tiny.make("sdxl-small"), "sdxl-small.safetensors")

    def flux(self) -> str:
        return self._add("diffusion_models", tiny.make("flux-tiny"), "flux-tiny.safetensors")

    def zimage(self) -> str:
        return self._add("diffusion_models", tiny.make("zimage"), "zimage.safetensors")

    def taesd(self) -> str:
        return self._add("vae", tiny.make("taesd"), "rig-taesd.safetensors")

    def taef(self) -> str:
        return self._add("vae", tiny.make("taef"), "rig-taef.safetensors")

    def lora(self, kind: str) -> str:
        return self._add("loras", tiny.lora(kind), f"{kind}-lora.safetensors")

    def _add(self, folder: str, file: Path, name: str) -> str:
        return self._server.add_model(folder, file, name)


@pytest.fixture(scope="session")
def server() -> Iterator[ComfyServer]:
    """A ComfyUI with our pack and the test nodes, one for the whole session."""
    with ComfyServer([TESTNODES], threads=THREADS) as running:
        yield running


@pytest.fixture(scope="session")
def models(server: ComfyServer) -> Models:
    """The small models; every method returns the name under which `server` offers the file."""
    return Models(server)


@pytest.fixture
def comfy() -> Iterator[ModuleType]:
    """rig.inprocess with ComfyUI imported; the test runs in inference mode, as nodes do."""
    from rig import inprocess

    inprocess.load_comfy()
    with torch.inference_mode():
        yield inprocess
