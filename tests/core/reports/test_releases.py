"""Files that earlier releases wrote stay reportable, and sessions of theirs stay usable."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hswq.hswq_core.calibration.session import load_session
from hswq.hswq_core.convert.header import HEADER_KEY, PLAN_KEY, declared_plan
from hswq.hswq_core.errors import FileError
from hswq.hswq_core.files.checkpoint import read_header
from hswq.hswq_core.plan.plan import KEEP, PLAN_VERSION, QUANTIZE, SKIP, Plan
from hswq.hswq_core.quant.metrics import sqnr_db
from hswq.hswq_core.reports.file import report_file
from hswq.hswq_core.reports.inspect import QuantizedFile, findings
from hswq.hswq_core.reports.session import report_session

FOLDER = Path(__file__).resolve().parents[2] / "data" / "releases"
RELEASES = ("0.1", "0.2")
ACTIONS = {"in.fc": QUANTIZE, "mid.conv": QUANTIZE, "out.fc": KEEP, "never.fc": SKIP, "tiny": SKIP}


def file_of(release: str) -> Path:
    return FOLDER / f"release_{release}.safetensors"


@pytest.fixture(params=RELEASES)
def path(request) -> Path:
    return file_of(request.param)


def plan_of(path: Path) -> Plan:
    plan = declared_plan(read_header(path)[0], path.name)
    assert plan is not None
    return plan


def test_the_records_lack_what_later_releases_have(path):
    """Else this file shows nothing."""
    plan = json.loads(read_header(path)[0][PLAN_KEY])
    assert "scheme" not in plan["layers"][0]
    assert ("granularity" in plan) == ("loss" in plan["layers"][0]) == ("0.2" in path.name)


def test_its_plan_is_read_with_what_is_missing_filled_in(path):
    plan = plan_of(path)
    assert {layer.name: layer.action for layer in plan.layers} == ACTIONS
    assert {layer.name: layer.scheme for layer in plan.layers if layer.scheme} == {"in.fc": "fp8", "mid.conv": "fp8"}
    assert all(layer.scaled and layer.amax > 0 and layer.sqnr_db > 25 for layer in plan.layers[:2])
    assert [layer.input_amax for layer in plan.layers] == [0.0] * 5
    assert (plan.file_format, plan.method, plan.budget, plan.granularity) == ("v2", "hswq", "0.5", "tensor")


def test_it_is_reported(path):
    report = report_file(path)
    assert {row.name: row.action for row in report.rows} == ACTIONS
    assert report.measure == "sensitivity"
    assert "2 quantized + 1 kept + 2 skipped" in report.markdown()
    assert list(findings(path)) == []


def test_its_weights_are_restored(path):
    """As near to what they were as the plan says; they were drawn in this order."""
    rng, file = torch.Generator().manual_seed(0), QuantizedFile(path)
    layers = {layer.name: layer for layer in plan_of(path).layers}
    for layer in (layers[name] for name in ACTIONS):
        w = (torch.randn(layer.shape, generator=rng) * 0.02).half()
        restored = file.restored(f"model.diffusion_model.{layer.name}.weight")
        sqnr = sqnr_db(w, restored)
        assert math.isinf(sqnr) if layer.sqnr_db is None else sqnr == pytest.approx(layer.sqnr_db, abs=1e-3)


def test_it_is_written_again_as_the_same_plan(path):
    plan = plan_of(path)
    assert Plan.from_json(plan.to_json()) == plan


def test_its_session_is_reported(path):
    session = path.with_suffix(".pt")
    assert load_session(session).calls == 4
    assert torch.equal(load_session(session).layers["in.fc"].importance[:1], torch.tensor([0.25], dtype=torch.float64))
    assert {row.name: row.action for row in report_session(session).rows if row.action == SKIP}.keys() == {
        "never.fc",
        "tiny",
    }


def test_a_plan_of_a_later_release_is_read_as_far_as_it_is_understood():
    """Fields that are not known go, numbers stay, a scheme that is not known is no error."""
    plan = json.loads(read_header(file_of("0.2"))[0][PLAN_KEY])
    plan |= {"precision": "mixed", "layers": [layer | {"groups": [1, 2], "energy": 2.5} for layer in plan["layers"]]}
    plan["layers"][0] |= {"scheme": "w3a8"}
    read = Plan.from_json(json.dumps(plan))
    assert read.layers[0].scheme == "w3a8"
    assert read.layers[0].stored is None
    assert [layer.numbers["energy"] for layer in read.layers] == [2.5] * 5
    assert "groups" not in read.layers[0].numbers


def test_a_plan_that_cannot_be_understood_says_which_release_to_get():
    metadata = dict(read_header(file_of("0.2"))[0])
    record = json.loads(metadata[HEADER_KEY])
    metadata[HEADER_KEY] = json.dumps(record | {"plan": PLAN_VERSION + 1})
    metadata[PLAN_KEY] = json.dumps({"layers": [{"name": "a", "kind": "Linear", "shape": [2, 2], "action": "fold"}]})
    with pytest.raises(FileError, match=f"plan version {PLAN_VERSION + 1}: update this node pack"):
        declared_plan(metadata, "x.safetensors")
    del metadata[HEADER_KEY]
    with pytest.raises(FileError, match="damaged"):
        declared_plan(metadata, "x.safetensors")
