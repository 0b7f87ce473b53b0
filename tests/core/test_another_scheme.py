"""Another number format is one row: INT8 with a scale for each output channel, here only, goes all the way.

Nothing but this file and the tables knows of it: rounded by its inputs, planned, counted against a budget, written,
reported, verified and restored.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from hswq.hswq_core.convert.output import Output
from hswq.hswq_core.errors import LayerError
from hswq.hswq_core.files.checkpoint import FileSource
from hswq.hswq_core.methods.decide import quantized
from hswq.hswq_core.methods.exclusions import Exclusions
from hswq.hswq_core.methods.method import Task
from hswq.hswq_core.methods.nearest import plan_nearest
from hswq.hswq_core.methods.solutions import Solutions
from hswq.hswq_core.methods.solve import solve
from hswq.hswq_core.model.families import GENERIC
from hswq.hswq_core.model.layer import Layer
from hswq.hswq_core.plan.budget import smallest_size
from hswq.hswq_core.plan.encoding import Encoding
from hswq.hswq_core.plan.formats import FORMATS, FileFormat
from hswq.hswq_core.plan.plan import Plan
from hswq.hswq_core.quant.grid import largest
from hswq.hswq_core.quant.metrics import sqnr_db
from hswq.hswq_core.quant.moments import Gram
from hswq.hswq_core.quant.schemes.scheme import CHANNEL, Scheme, Steps
from hswq.hswq_core.quant.schemes.table import SCHEMES
from hswq.hswq_core.reports.file import report_file
from hswq.hswq_core.reports.inspect import QuantizedFile, findings
from safetensors.torch import save_file

LINEAR, CONV = Layer("fc", "Linear", (192, 128), torch.float16), Layer("conv", "Conv2d", (64, 32, 3, 3), torch.float16)


class Int8(Scheme):
    """codes · scale of the output channel, codes from -127 to 127."""

    name = "int8"
    number_format = "int8_tensorwise"
    dtype = torch.int8
    granularity = CHANNEL

    def limited(self, limit):
        unit = torch.as_tensor(limit, dtype=torch.float32) / 127
        return Steps(torch.where(unit > 0, unit, torch.ones_like(unit)))

    def cast(self, x):
        return x.round().clamp(-127, 127).to(torch.int8)

    def widen(self, codes):
        return codes.to(torch.float32)


@pytest.fixture(autouse=True)
def row(monkeypatch) -> FileFormat:
    """The scheme, and a format that stores every layer by it."""
    kinds = {"Linear": (Int8.name,), "Conv2d": (Int8.name,)}
    made = FileFormat("int8", kinds, FORMATS["comfy"].spelled, "its own loader", all_scaled=True)
    monkeypatch.setitem(SCHEMES, Int8.name, Int8())
    monkeypatch.setitem(FORMATS, made.name, made)
    return made


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    """Channels of very different sizes, which one scale would serve badly."""
    sizes = torch.logspace(-3, 0, 192)[:, None]
    return {"fc": (torch.randn(LINEAR.shape) * sizes).half(), "conv": (torch.randn(CONV.shape) * 0.02).half()}


def inputs(rows: int, columns: int = 128) -> torch.Tensor:
    """Correlated, as those of a model are."""
    return torch.randn(rows, 16) @ torch.randn(16, columns, generator=torch.Generator().manual_seed(1)) + 0.1


def gram(rows: int):
    sums = Gram("fc", 128)
    sums.add(inputs(rows))
    return sums.moments()


def task(row: FileFormat, weights, folder) -> Task:
    return Task(
        layers=[LINEAR, CONV],
        read=lambda layer: weights[layer.name],
        exclusions=Exclusions(GENERIC),
        encoding=Encoding(row),
        solutions=Solutions(folder / "work"),
    )


def test_the_steps_are_each_channels_own(weights):
    steps = SCHEMES["int8"].steps(weights["fc"])
    assert steps.unit.shape == (192, 1)
    assert torch.equal(steps.unit[:, 0], weights["fc"].float().abs().amax(1) / 127)


def test_compensated_rounding_wins_on_its_grid(weights):
    w = weights["fc"].float()
    found = solve(LINEAR, w, gram(4000), gram(1000), scheme=SCHEMES["int8"], has_bias=True)
    assert found.how == "compensated"
    assert found.error < 0.5 * found.nearest_error
    assert found.codes.dtype == torch.int8
    off = (found.codes.float() - w / found.scale).abs()
    assert 0.5 < off.max() < 4  # compensation moves codes by steps, it does not leave the grid
    assert torch.equal(found.restored(torch.device("cpu")), found.codes.float() * found.scale)


def test_solutions_of_it_survive_on_disk(weights, tmp_path):
    solution = solve(LINEAR, weights["fc"], gram(4000), gram(1000), scheme=SCHEMES["int8"], has_bias=False)
    Solutions.resumed(tmp_path, "key").add("fc", solution)
    again = Solutions.resumed(tmp_path, "key")["fc"]
    assert torch.equal(again.codes, solution.codes)
    assert torch.equal(again.scale, solution.scale)
    assert (again.scheme, again.how) == ("int8", "compensated")


def test_its_bytes_count_codes_and_scales(weights, source_of):
    source = source_of({f"{name}.weight": w for name, w in weights.items()} | {"x": torch.ones(10)})
    size = smallest_size(source.entries, "", [LINEAR, CONV], Encoding(FORMATS["int8"]).scheme)
    assert size == 192 * 128 + 4 * 192 + 64 * 32 * 9 + 4 * 64 + 40


def test_written_reported_verified_and_restored(row, weights, source_of, tmp_path):
    source = source_of({f"{name}.weight": w for name, w in weights.items()} | {"fc.bias": torch.zeros(192).half()})
    solution = solve(LINEAR, weights["fc"], gram(4000), gram(1000), scheme=SCHEMES["int8"], has_bias=True)
    nearest = plan_nearest(task(row, weights, tmp_path)).plan
    solved = quantized(LINEAR, solution.how, SCHEMES["int8"], largest(weights["fc"]), 30.0)
    plan = Plan(row.name, "model_aware", "0pct", GENERIC.name, (solved, nearest.layers[1]))
    path = tmp_path / "toy.safetensors"
    done = Output(source, "", plan, solutions={"fc": solution}).write(path)
    assert "2 quantized + 0 kept + 0 skipped = 2 layers" in done.report

    file = FileSource(path)
    shapes = {key: (info.dtype, info.shape) for key, info in file.entries.items()}
    assert shapes["fc.weight"] == (torch.int8, (192, 128))
    assert shapes["fc.weight_scale"] == (torch.float32, (192, 1))
    assert shapes["conv.weight_scale"] == (torch.float32, (64, 1, 1, 1))
    marker = json.loads(bytes(file.read("conv.comfy_quant").tolist()))
    assert marker == {"format": "int8_tensorwise", "full_precision_matrix_mult": True}
    assert json.loads(file.metadata["hswq"])["grid"] == "int8_tensorwise"

    restored = QuantizedFile(path)
    assert torch.equal(restored.restored("fc.weight"), solution.restored(torch.device("cpu")))
    measured = nearest.layers[1].sqnr_db
    assert measured > 35  # FP8 leaves 31.5
    assert sqnr_db(weights["conv"], restored.restored("conv.weight")) == pytest.approx(measured, abs=1e-4)
    assert list(findings(path)) == []
    report = report_file(path)
    assert [(r.name, r.action, r.nbytes) for r in report.rows] == [
        ("fc", "quantize", 192 * 128),
        ("conv", "quantize", 64 * 32 * 9),
    ]


def test_a_lost_scale_is_found(row, weights, source_of, tmp_path):
    source = source_of({f"{name}.weight": w for name, w in weights.items()})
    path = tmp_path / "toy.safetensors"
    output = Output(source, "", plan_nearest(task(row, weights, tmp_path)).plan)
    lost = [tensor for tensor in output.tensors() if tensor.key != "conv.weight_scale"]
    tensors = {tensor.key: tensor.produce() for tensor in output.tensors()}
    header = {"hswq": json.dumps({"version": 1, "format": "int8", "counts": {"quantize": 2}})}
    save_file({tensor.key: tensors[tensor.key] for tensor in lost}, path, header)
    assert any("conv.weight: no scale" in line for line in findings(path))


def test_a_file_of_it_is_no_source(row, weights, source_of, tmp_path):
    path = tmp_path / "toy.safetensors"
    source = source_of({f"{name}.weight": w for name, w in weights.items()})
    Output(source, "", plan_nearest(task(row, weights, tmp_path)).plan).write(path)
    assert FileSource(path).entries["fc.weight"].dtype == torch.int8
    wrong = [replace(layer, dtype=torch.int8) for layer in (LINEAR, CONV)]
    with pytest.raises(LayerError, match="already"):
        plan_nearest(replace(task(row, weights, tmp_path), layers=wrong))
