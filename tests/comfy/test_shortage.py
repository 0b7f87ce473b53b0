"""Running out of memory while rounding: fewer layers at a time, then fall back to nearest, and the report says so.

The device is a small one: gathered data counts against a limit, and beyond it torch's own error is raised where the
memory would be allocated. Memory that is not released keeps counting.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch
from hswq.hswq_core.files.checkpoint import FileSource
from hswq.hswq_core.methods.solve import UNSOLVED
from hswq.hswq_core.quant.moments import Gram

pytestmark = pytest.mark.comfy


class Device:
    """Room for second moments.

    Attributes:
        limit: bytes.
        most: peak bytes.
        refused: layers that did not fit, in order.
    """

    def __init__(self, limit: float) -> None:
        self.limit, self.most = limit, 0
        self.refused: list[str] = []
        self._held = weakref.WeakSet[torch.Tensor]()

    def patch(self, monkeypatch) -> Device:
        real = Gram.add

        def add(gram: Gram, rows: torch.Tensor) -> None:
            fresh = gram._sum is None
            if fresh and self.size + 4 * gram.width**2 > self.limit:
                self.refused.append(gram.name)
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate some")
            real(gram, rows)
            if fresh:
                self._held.add(gram._sum)
                self.most = max(self.most, self.size)

        monkeypatch.setattr(Gram, "add", add)
        return self

    @property
    def size(self) -> int:
        return sum(tensor.nbytes for tensor in list(self._held))


def codes(path) -> dict[str, bytes]:
    """{key: bytes} of every tensor of a file."""
    file = FileSource(path)
    return {key: file.read(key).contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for key in file.entries}


def roomy(calibrated, monkeypatch) -> tuple[Device, dict[str, bytes]]:
    """A conversion with unlimited memory: its device, which knows the peak, and the file's tensors."""
    with monkeypatch.context() as patched:
        device = Device(float("inf")).patch(patched)
        done = calibrated.convert()
    assert "memory ran out" not in done.report
    tensors = codes(done.path)
    done.path.unlink()
    return device, tensors


def test_with_fewer_layers_at_a_time_the_file_is_the_same(calibrated, monkeypatch, caplog):
    whole, tensors = roomy(calibrated, monkeypatch)
    widest = 4 * 1280**2  # linear2 of a single block: 256 + 4 x 256 columns
    device = Device(1.5 * widest).patch(monkeypatch)
    assert device.limit < whole.most
    done = calibrated.convert()
    assert device.refused
    assert "memory ran out; going on with" in caplog.text
    assert "memory ran out" not in done.report
    assert codes(done.path) == tensors
    assert not calibrated.hooks


def test_a_layer_for_whose_inputs_there_is_no_memory_is_rounded_to_nearest(calibrated, monkeypatch, caplog):
    _, tensors = roomy(calibrated, monkeypatch)
    Device(3.9 * 1280**2).patch(monkeypatch)
    done = calibrated.convert(extra_percent=0.0)
    unsolved = [layer.name for layer in done.plan.layers if layer.reason == UNSOLVED]
    assert unsolved == ["single_blocks.0.linear2", "single_blocks.1.linear2"]
    assert "memory ran out for 2 layers" in done.report
    assert all(name in done.report for name in unsolved)
    assert f"2 {UNSOLVED}" in done.report
    assert caplog.text.count("it is rounded to nearest") == 2
    found = codes(done.path)
    others = {layer.name for layer in done.plan.layers if layer.reason in ("compensated", "nearest")}
    weights = [f"{name}.weight" for name in others]
    same = [key for key in weights if len(found[key]) == len(tensors[key])]  # not those that +3 % keeps in 16 bits
    assert len(same) > 15
    assert all(found[key] == tensors[key] for key in same)
    assert not calibrated.hooks
    assert not list(calibrated.output.glob("hswq_stats/*.work"))


@pytest.mark.parametrize("times", [1, 10**6])
def test_no_memory_to_solve_one_layer(calibrated, monkeypatch, caplog, times):
    """Once: it succeeds with less in memory. Always: nearest for this layer, the others as usual."""
    from hswq.loader.model_aware import solver

    _, tensors = roomy(calibrated, monkeypatch)
    real, name, failed = solver.solve, "double_blocks.0.img_mlp.0", []

    def solve(layer, *args, **kwargs):
        if layer.name == name and len(failed) < times:
            failed.append(layer.name)
            torch.empty(2**50)  # no machine has a pebibyte
        return real(layer, *args, **kwargs)

    monkeypatch.setattr(solver, "solve", solve)
    done = calibrated.convert()
    assert "memory ran out; going on with" in caplog.text
    reasons = {layer.name: layer.reason for layer in done.plan.layers}
    if times == 1:
        assert codes(done.path) == tensors
        return
    assert len(failed) > 2
    assert reasons[name] == UNSOLVED
    assert f"{name}. Close other programs" in done.report


@pytest.mark.compat
def test_other_errors_are_no_shortage():
    from hswq.loader.model_aware.shortage import attempted

    def fail() -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        attempted(fail)
    assert attempted(lambda: 3) == 3


@pytest.mark.parametrize(
    "ask",
    [
        pytest.param(lambda: torch.empty(2**50), marks=pytest.mark.compat),
        lambda: torch.empty(2**45, dtype=torch.float64),
    ],
    ids=["PiB", "256 TiB"],
)
def test_what_the_cpu_cannot_give_is_a_shortage(comfy, ask: Callable[[], torch.Tensor]):
    from hswq.loader.model_aware.shortage import attempted

    assert attempted(ask) is None


@pytest.mark.compat
def test_what_was_held_is_given_back(comfy):
    from hswq.loader.model_aware.shortage import attempted

    held: list[weakref.ref[torch.Tensor]] = []

    def ask() -> torch.Tensor:
        mine = torch.zeros(1000)
        held.append(weakref.ref(mine))
        return mine + torch.empty(2**50)

    assert attempted(ask) is None
    assert held[0]() is None
