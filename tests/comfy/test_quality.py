"""Guards the benchmark's numbers: a method that loses half a decibel on a reference model fails here.

The same path as `nox -s quality`, with fewer pictures: calibrate, convert, open, draw, compare with FP16.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from judge import report
from judge.methods import METHODS
from judge.scores import Score, Truth, judge, sizes
from judge.sheet import contact_sheet
from judge.subject import Subject
from PIL import Image
from reference_models.architectures import REFERENCES
from rig import tiny

pytestmark = pytest.mark.comfy

MODEL, PICTURES, CALIBRATION = "flux", 8, 16
WITHIN_DB = 0.5
# Mean PSNR in dB, as recorded (AMD EPYC, torch 2.11.0).
PINNED = {
    "cast": 42.59,
    "nearest v2": 42.33,
    "nearest comfy": 42.33,
    "learned v2": 42.91,
    "learned comfy": 42.91,
    "published 0.1 v1": 42.32,
    "published 0.25 v2": 43.92,
    "hswq 0.25 v1": 46.93,
    "hswq 0.25 v2": 47.37,
    "hswq 0.25 comfy": 47.37,
    "model_aware 3 v1": 53.69,
    "model_aware 3 v2": 54.91,
    "model_aware 3 comfy": 54.91,
    "int8 convrot": 56.98,
}
BY_NAME = {method.name: method for method in METHODS}


@pytest.fixture(scope="module")
def bench() -> tuple[Subject, Truth]:
    subject = Subject(REFERENCES[MODEL], CALIBRATION)
    return subject, Truth.of(REFERENCES[MODEL], PICTURES)


@pytest.fixture(scope="module")
def scored(bench) -> Callable[[str], tuple[Score, torch.Tensor]]:
    known: dict[str, tuple[Score, torch.Tensor]] = {}

    def score(name: str) -> tuple[Score, torch.Tensor]:
        if name not in known:
            known[name] = judge(BY_NAME[name], *bench)
        return known[name]

    return score


def require_pinned(score: Score) -> None:
    mean = float(np.mean(score.psnr))
    assert abs(mean - PINNED[score.method]) <= WITHIN_DB, (
        f"{score.method}: {mean:.2f} dB, pinned {PINNED[score.method]}"
    )


@pytest.mark.parametrize("name", sorted(PINNED))
def test_every_method_draws_as_well_as_recorded(scored, name):
    require_pinned(scored(name)[0])


def test_every_kind_of_method_is_pinned():
    """Except the peer whose tool is not installed here and takes minutes."""
    kinds = {method.name.split(" ")[0] for method in METHODS if not method.slow}
    assert {name.split(" ")[0] for name in PINNED} == kinds


def test_a_scale_in_the_wrong_direction_is_caught(bench, monkeypatch):
    """A v2 file whose scale is the multiplier at quantize, as some tools write it, must not pass."""
    from hswq.hswq_core.plan import formats

    row = formats.FORMATS["v2"]

    def inverse(scheme, tensors, input_scale):
        spelled = row.spelled(scheme, tensors, input_scale)
        return spelled | {"scale": 1 / spelled["scale"]}

    monkeypatch.setitem(formats.FORMATS, "v2", replace(row, spelled=inverse))
    score, _ = judge(BY_NAME["nearest v2"], *bench)
    with pytest.raises(AssertionError, match="pinned"):
        require_pinned(score)


def test_a_method_that_keeps_the_wrong_layers_is_caught(bench, monkeypatch):
    """Here the budget is spent on the layers that change the output least."""
    from hswq.loader.model_aware import candidates

    right = candidates.choose_kept

    def wrong(change, cost, budget):
        return right({name: 1 / (value + 1e-12) for name, value in change.items()}, cost, budget)

    monkeypatch.setattr(candidates, "choose_kept", wrong)
    score, _ = judge(BY_NAME["model_aware 3 v2"], *bench)
    with pytest.raises(AssertionError, match="pinned"):
        require_pinned(score)


def test_bytes_are_counted_from_the_file(scored):
    score, _ = scored("nearest v2")
    assert (score.quantized, score.layers) == (score.layers, score.layers)
    weights = score.quantized_bytes - 4 * score.layers  # one float32 scale per layer
    total = sum(torch.Size(shape).numel() for shape in tiny.layer_shapes(REFERENCES[MODEL].file).values())
    assert weights == total
    assert 0 < score.extra < 0.001
    kept, _ = scored("published 0.25 v2")
    assert kept.quantized == kept.layers - int(0.25 * kept.layers)
    assert kept.extra > 0.05


def test_the_source_itself_has_no_eight_bit_layer():
    file = REFERENCES[MODEL].file
    found = sizes(file, file)
    assert found["quantized"] == found["quantized_bytes"] == 0
    assert 0.9 < found["extra"] < 1.0


def test_results_survive_json_and_disagreements_are_found(scored):
    score, _ = scored("cast")
    results = {MODEL: [score]}
    again = report.from_json(report.to_json(results, {"prompts": str(PICTURES)}))
    assert again == results
    assert report.disagreements(results, again) == []
    worse = {MODEL: [replace(score, psnr=[value - 1 for value in score.psnr])]}
    assert report.disagreements(results, worse) == [f"{MODEL}, cast: +1.00 dB"]
    line = report.table([score]).splitlines()[-1]
    assert f"| {np.mean(score.psnr):.1f} | {np.percentile(score.psnr, 5):.1f} | {min(score.psnr):.1f} |" in line


def test_the_plot_and_the_contact_sheet_show_something(scored, bench, tmp_path):
    drawn = [scored(name) for name in ("cast", "nearest v2")]
    report.plot({MODEL: [score for score, _ in drawn]}, {MODEL: "SDXL"}, tmp_path / "plot.png")
    contact_sheet(bench[1], drawn, tmp_path / "sheet.png", count=2)
    for name in ("plot.png", "sheet.png"):
        pixels = np.asarray(Image.open(tmp_path / name).convert("RGB"))
        assert pixels.std() > 10
        assert min(pixels.shape[:2]) > 200
