"""Fixtures of the core's tests: statistics, sessions and sources made in memory. No ComfyUI."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import pytest
import torch
from hswq.hswq_core.calibration.observer import LayerStats
from hswq.hswq_core.calibration.session import Session
from hswq.hswq_core.files.checkpoint import TensorInfo
from hswq.hswq_core.model.fingerprint import Fingerprint, layout_hash, sample_weights


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Threads gain nothing on small tensors, and on a busy machine they wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class MemorySource:
    """A TensorSource over a dict."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
        self.name = "toy"
        self.tensors = dict(tensors)
        self.metadata = dict(metadata or {})
        self.entries = {key: TensorInfo(t.dtype, tuple(t.shape)) for key, t in self.tensors.items()}

    def read(self, key: str) -> torch.Tensor:
        return self.tensors[key]


@pytest.fixture
def source_of() -> type[MemorySource]:
    """Call with {key: tensor} and optionally metadata."""
    return MemorySource


def _stats(
    kind: str, shape: tuple[int, ...], *, sensitivity: float = 1.0, channels: int | None = None, calls: int = 2
) -> LayerStats:
    channels = channels or shape[1]
    ramp = torch.linspace(0.5, 1.5, channels, dtype=torch.float64)
    return LayerStats(
        kind=kind,
        shape=shape,
        in_calls=calls,
        out_calls=calls,
        out_sum=0.0,
        out_sq_sum=sensitivity * calls,
        abs_sum=ramp * calls,
        mean_sum=ramp * calls * 0.25,
        input_amax=3.0,
    )


@pytest.fixture
def stats_of() -> Callable[..., LayerStats]:
    """Call with kind, shape and optionally sensitivity, channels, calls: importance runs from 0.5 to 1.5."""
    return _stats


def _session(weights: Mapping[str, torch.Tensor], layers: Mapping[str, LayerStats]) -> Session:
    layout = layout_hash({name: (stats.kind, stats.shape) for name, stats in layers.items()})
    fingerprint = Fingerprint(layout, sample_weights(layers, lambda name: weights[name]))
    calls = max(stats.in_calls for stats in layers.values())
    return Session(
        "generic", fingerprint, dict(layers), calls=calls, images=1, steps={20: 1}, created=10.0, updated=20.0
    )


@pytest.fixture
def session_of() -> Callable[..., Session]:
    """Call with {layer: weight} and {layer: stats}."""
    return _session
