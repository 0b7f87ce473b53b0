from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hswq.hswq_core.calibration.observer import LayerStats
from hswq.hswq_core.calibration.predecessor import import_predecessor, is_predecessor
from hswq.hswq_core.calibration.session import Session, load_session, read_pt, save_session
from hswq.hswq_core.errors import SessionError
from hswq.hswq_core.model.fingerprint import Fingerprint

LAYERS = {"blocks.0.fc": ("Linear", (4, 3), 3), "blocks.0.conv": ("Conv2d", (4, 2, 3, 3), 2)}
FINGERPRINT = Fingerprint("layout", torch.arange(8.0))


def model() -> dict[str, LayerStats]:
    """Empty statistics of the connected model."""
    return {name: LayerStats.empty(*row) for name, row in LAYERS.items()}


def theirs(prefix: str = "model.diffusion_model.") -> dict[str, Any]:
    """Two calls of the Linear with mean(y) = 1, 3 and mean(y²) = 2, 10; three of the convolution."""
    return {
        "meta": {"type": "hswq_dual_monitor_v2"},
        "layers": {
            f"{prefix}blocks.0.conv": {
                "output_sum": 6.0,
                "output_sq_sum": 12.0,
                "out_count": 3,
                "input_imp_sum": torch.tensor([3.0, 9.0], dtype=torch.float64),
                "in_count": 3,
            },
            f"{prefix}blocks.0.fc": {
                "output_sum": 4.0,
                "output_sq_sum": 12.0,
                "out_count": 2,
                "input_imp_sum": torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64),
                "in_count": 2,
            },
        },
    }


def saved(tmp_path: Path, data: object) -> Path:
    path = tmp_path / "theirs.pt"
    torch.save(data, path)
    return path


def imported(path: Path) -> Session:
    return import_predecessor(path, model(), FINGERPRINT, "SDXL")


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "model.diffusion_model."])
def test_their_sums_become_ours(prefix, tmp_path):
    session = imported(saved(tmp_path, theirs(prefix)))
    assert list(session.layers) == list(LAYERS)
    linear, conv = session.layers.values()
    assert linear.importance.tolist() == [0.5, 1.0, 2.5]
    assert linear.sensitivity == 2.0  # 12/2 - (4/2)²
    assert conv.importance.tolist() == [1.0, 3.0]
    assert conv.sensitivity == 0.0  # 12/3 - (6/3)²
    assert (linear.kind, linear.shape, linear.in_calls, linear.out_calls) == ("Linear", (4, 3), 2, 2)
    assert (conv.kind, conv.shape, conv.in_calls, conv.out_calls) == ("Conv2d", (4, 2, 3, 3), 3, 3)
    assert (session.family, session.calls) == ("SDXL", 3)
    assert session.fingerprint is FINGERPRINT


def test_what_they_do_not_record_is_zero(tmp_path):
    stats = imported(saved(tmp_path, theirs())).layers["blocks.0.fc"]
    assert stats.input_mean.tolist() == [0.0, 0.0, 0.0]
    assert stats.input_amax == 0.0


def test_only_their_files_are_recognized(tmp_path, session_of, stats_of):
    assert is_predecessor(read_pt(saved(tmp_path, theirs())))
    for other in ({}, {"meta": None}, {"meta": {"type": "hswq_dual_monitor_v1"}}, {"meta": "hswq_dual_monitor_v2"}):
        assert not is_predecessor(read_pt(saved(tmp_path, other)))
    ours = tmp_path / "ours.pt"
    save_session(session_of({"fc": torch.ones(4, 3)}, {"fc": stats_of("Linear", (4, 3))}), ours)
    assert not is_predecessor(read_pt(ours))
    with pytest.raises(SessionError, match=r"ours\.pt"):
        imported(ours)
    with pytest.raises(SessionError, match=r"theirs\.pt"):
        load_session(saved(tmp_path, theirs()))


def test_a_layer_the_model_lacks_is_an_error_that_names_it(tmp_path):
    data = theirs()
    data["layers"]["blocks.7.fc"] = dict(data["layers"]["model.diffusion_model.blocks.0.fc"])
    with pytest.raises(SessionError, match=r"theirs\.pt, layer blocks\.7\.fc"):
        imported(saved(tmp_path, data))


def test_a_layer_they_lack_is_an_error_that_names_it(tmp_path):
    data = theirs()
    del data["layers"]["model.diffusion_model.blocks.0.fc"]
    with pytest.raises(SessionError, match=r"theirs\.pt, layer blocks\.0\.fc"):
        imported(saved(tmp_path, data))


def damage(**changes: object) -> dict[str, Any]:
    data = theirs("")
    record = data["layers"]["blocks.0.fc"]
    record.update(changes)
    for key, value in changes.items():
        if value is None:
            del record[key]
    return data


@pytest.mark.parametrize(
    "data",
    [
        damage(input_imp_sum=torch.ones(4, dtype=torch.float64)),
        damage(input_imp_sum=torch.ones(1, dtype=torch.float64)),
        damage(input_imp_sum=torch.ones(1, 3, dtype=torch.float64)),
        damage(input_imp_sum=torch.tensor([1.0, math.nan, 1.0])),
        damage(input_imp_sum=torch.tensor([1.0, -1.0, 1.0])),
        damage(input_imp_sum="three"),
        damage(input_imp_sum=None),
        damage(output_sum=math.inf),
        damage(output_sq_sum=math.nan),
        damage(output_sum=None),
        damage(in_count=-2),
        damage(out_count=-2),
        damage(in_count=None),
        damage(out_count="many"),
        damage(out_count=math.inf),
        {**theirs(), "layers": {"blocks.0.fc": 1, "blocks.0.conv": 2}},
        {**theirs(), "layers": {1: {}}},
        {**theirs(), "layers": {}},
        {**theirs(), "layers": [1]},
        {**theirs(), "layers": None},
        {"meta": theirs()["meta"]},
    ],
)
def test_a_damaged_file_is_a_session_error_that_names_it(data, tmp_path):
    with pytest.raises(SessionError, match=r"theirs\.pt"):
        imported(saved(tmp_path, data))


def test_the_models_empty_statistics_stay_empty(tmp_path):
    empty = model()
    before = copy.deepcopy(empty)
    import_predecessor(saved(tmp_path, theirs()), empty, FINGERPRINT, "SDXL").merge(
        import_predecessor(saved(tmp_path, theirs()), empty, FINGERPRINT, "SDXL")
    )
    for name, stats in empty.items():
        assert stats.in_calls == before[name].in_calls == 0
        assert torch.equal(stats.abs_sum, before[name].abs_sum)
