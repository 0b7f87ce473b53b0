"""Converted files and their stock twins, made once by the product's own path."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hswq.hswq_core.convert.conversion import Conversion
from hswq.hswq_core.files.checkpoint import FileSource
from hswq.hswq_core.progress import Progress, no_progress
from hswq.hswq_core.quant.grid import FLOAT8_E4M3FN, by_channel
from rig import inprocess, tiny
from safetensors.torch import save_file

PREFIX = "model.diffusion_model."


@dataclass
class Converted:
    """A converted file and what it should hold."""

    path: Path
    plan: Any
    comfy: Any

    @cached_property
    def source(self) -> FileSource:
        """Its header, read once."""
        return FileSource(self.path)

    @cached_property
    def prefix(self) -> str:
        return PREFIX if any(key.startswith(PREFIX) for key in self.source.entries) else ""

    def weight(self, name: str) -> torch.Tensor:
        """Core's dequantize of what is in the file."""
        file, stem = self.source, f"{self.prefix}{name}."
        scale = next((file.read(stem + s) for s in ("scale", "weight_scale") if stem + s in file.entries), None)
        codes = file.read(f"{stem}weight")
        return FLOAT8_E4M3FN.dequantize(codes, None if scale is None else by_channel(scale, codes.dim()))

    @property
    def quantized(self) -> list[str]:
        """Names of the FP8 layers."""
        return [layer.name for layer in self.plan.layers if layer.action == "quantize"]

    def open(self, **options: Any) -> Any:
        """By HSWQ Diffusion Model Loader."""
        return inprocess.open_fp8(self.path, **options)

    def open_twin(self) -> Any:
        """The stock loader's model of the same weights, dequantized by core, all in float32."""
        twin = self.path.with_suffix(".twin.safetensors")
        if not twin.exists():
            state = {key: self.source.read(key) for key in self.source.entries}
            for name in self.quantized:
                stem = f"{self.prefix}{name}."
                state[f"{stem}weight"] = self.weight(name)
                for suffix in ("scale", "weight_scale", "comfy_quant", "input_scale"):
                    state.pop(f"{stem}{suffix}", None)
            save_file({k: t.float().contiguous() if t.is_floating_point() else t for k, t in state.items()}, twin)
        return self.comfy.load_model(twin)


def modules(model: Any) -> dict[str, Any]:
    """{name: module} of a MODEL's Linear and Conv2d."""
    from hswq.loader.model import layer_modules

    return layer_modules(model.model.diffusion_model)


def run_node(module: str, name: str, **inputs: Any) -> Any:
    """First output of one of ComfyUI's own nodes, old or new style."""
    kind = getattr(importlib.import_module(module), name)
    if hasattr(kind, "define_schema"):
        output = kind.execute(**inputs)
        return getattr(output, "args", output)[0]
    return getattr(kind(), kind.FUNCTION)(**inputs)[0]


@pytest.fixture(scope="session")
def tools() -> Any:
    """The helpers of this file, for tests: opened, modules, run_node."""
    return SimpleNamespace(opened=inprocess.open_fp8, modules=modules, run_node=run_node)


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> Callable[..., Converted]:
    """(comfy, kind, format, **settings of the Converter) -> Converted, each once."""
    done: dict[Any, Converted] = {}
    folder = tmp_path_factory.mktemp("converted")

    def get(comfy: Any, kind: str, name: str, **settings: Any) -> Converted:
        key = (kind, name, *sorted(settings.items()))
        if key not in done:
            done[key] = _convert(comfy, folder, kind, name, len(done), settings)
        return done[key]

    return get


def _convert(comfy: Any, folder: Path, kind: str, name: str, number: int, settings: dict[str, Any]) -> Converted:
    import folder_paths
    from hswq.loader.calibration.model import calibrated
    from hswq.loader.convert.model import Request, convert_model
    from hswq.loader.sessions.store import path_of

    before = folder_paths.get_output_directory()
    folder_paths.set_output_directory(str(folder))
    try:
        model, session = comfy.load_model(tiny.make(kind)), f"session-{number}"
        comfy.sample(calibrated(model, path_of(session), 50, lambda text: None))
        request = Request(session, name, **{"method": "hswq", "keep_ratio": 0.25, **settings})
        finished = convert_model(model, None, None, request, lambda *_: None)
    finally:
        folder_paths.set_output_directory(before)
    return Converted(finished.path, finished.plan, comfy)


@pytest.fixture
def fp8_compute(comfy) -> Iterator[None]:
    """ComfyUI believes that the device multiplies in FP8; torch emulates that on a CPU."""
    from comfy import model_management

    known, model_management.SUPPORT_FP8_OPS = model_management.SUPPORT_FP8_OPS, True
    yield
    model_management.SUPPORT_FP8_OPS = known


@dataclass
class Calibrated:
    """A small calibrated model in an output folder of its own.

    Attributes:
        model: a ModelPatcher.
        session: its statistics' name.
        output: ComfyUI's output folder.
    """

    model: Any
    session: str
    output: Path

    def convert(self, progress: Progress = no_progress, **settings: Any) -> Conversion:
        """``settings`` of the Request."""
        from hswq.loader.convert.model import Request, convert_model

        request = Request(self.session, **{"file_format": "v2", **settings})
        with torch.inference_mode():
            return convert_model(self.model, None, None, request, progress)

    @property
    def files(self) -> set[str]:
        """Everything below the output folder but locks."""
        found = (path for path in self.output.rglob("*") if path.suffix != ".lock")
        return {path.relative_to(self.output).as_posix() for path in found}

    @property
    def hooks(self) -> int:
        """How many hang on the model."""
        modules = self.model.model.diffusion_model.modules()
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)


@pytest.fixture
def calibrated(tmp_path) -> Iterator[Calibrated]:
    """flux-tiny, two pictures of six calls, every call kept."""
    inprocess.load_comfy()
    import folder_paths
    from hswq.loader.calibration.model import calibrated as wrapped
    from hswq.loader.sessions.store import path_of

    before = folder_paths.get_output_directory()
    folder_paths.set_output_directory(str(tmp_path / "output"))
    try:
        with torch.inference_mode():
            model = inprocess.load_model(tiny.make("flux-tiny"))
            watched = wrapped(model, path_of("small"), 50, lambda _line: None)
        for prompt in range(2):
            inprocess.sample(watched, steps=6, cfg=1.0, seed=prompt, prompt=prompt)
        yield Calibrated(model, "small", tmp_path / "output")
    finally:
        folder_paths.set_output_directory(before)


@pytest.fixture
def counted() -> Callable[[Any], AbstractContextManager[dict[str, int]]]:
    """``with counted(replay) as counts``: {layer: its calls within the context}."""
    from hswq.loader.replay.replay import hooked

    @contextmanager
    def within(replay: Any) -> Iterator[dict[str, int]]:
        counts = dict.fromkeys(replay.modules, 0)

        def count(name: str) -> Callable[..., None]:
            def hook(_module: Any, _args: Any) -> None:
                counts[name] += 1

            return hook

        with hooked(module.register_forward_pre_hook(count(name)) for name, module in replay.modules.items()):
            yield counts

    return within
