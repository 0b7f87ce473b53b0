"""Comparing pictures: hand-computed scores, broken pictures, the verdict, the drawings."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import matplotlib as mpl
import pytest
import torch
from hswq.figures.compare import compare
from hswq.figures.perceptual import lpips_here
from hswq.figures.scores import MOST_DB, psnr, ssim
from hswq.figures.side_by_side import GAP, INFERNO, flicker, heat_map, side_by_side
from hswq.figures.verdict import LEVELS, USUAL, Comparison, Pair
from hswq.hswq_core.errors import SettingError
from hswq.hswq_core.progress import Step
from rig import pack


def pictures(count: int = 1, height: int = 16, width: int = 16, channels: int = 3) -> torch.Tensor:
    """Noise in 0.2..0.8, [B, H, W, C]."""
    return 0.2 + 0.6 * torch.rand(count, height, width, channels)


# ----- scores


@pytest.mark.parametrize(("offset", "decibels"), [(0.1, 20.0), (0.01, 40.0), (1.0, 0.0)])
def test_psnr_of_a_constant_offset(offset, decibels):
    """The mean squared difference is offset²: -20·log10(offset)."""
    reference = torch.zeros(3, 20, 20)
    assert psnr(reference + offset, reference) == pytest.approx(decibels, abs=1e-4)


def test_psnr_of_one_pixel_in_a_hundred():
    """One of 100 values off by 0.5: 10·log10(100 / 0.25)."""
    reference, picture = torch.zeros(1, 10, 10), torch.zeros(1, 10, 10)
    picture[0, 3, 4] = 0.5
    assert psnr(picture, reference) == pytest.approx(10 * math.log10(400), abs=1e-4)


def test_equal_pictures_have_the_most_decibels_and_ssim_1():
    picture = torch.rand(3, 24, 24)
    assert psnr(picture, picture) == MOST_DB == 100
    assert ssim(picture, picture) == pytest.approx(1, abs=1e-5)


def test_ssim_of_two_flat_pictures():
    """No variance except from float32: (2·a·b + c) / (a² + b² + c), c = 0.01²."""
    a, b, c = 0.25, 0.75, 1e-4
    expected = (2 * a * b + c) / (a * a + b * b + c)
    assert ssim(torch.full((3, 30, 30), a), torch.full((3, 30, 30), b)) == pytest.approx(expected, abs=5e-4)


def test_ssim_sees_structure_where_psnr_does_not():
    """Shifted by a constant, or by noise with the same mean square: the same PSNR, a different SSIM."""
    reference = torch.rand(3, 32, 32) * 0.5 + 0.25
    noise = torch.randn(3, 32, 32)
    noise *= 0.1 / noise.square().mean().sqrt()
    assert psnr(reference + noise, reference) == pytest.approx(psnr(reference + 0.1, reference), abs=1e-3)
    assert ssim(reference + noise, reference) < ssim(reference + 0.1, reference) - 0.02


@pytest.mark.parametrize("side", [1, 2, 3, 5, 6, 10])
def test_pictures_smaller_than_the_window_have_an_ssim(side):
    picture = 0.25 + 0.5 * torch.rand(3, side, side + 40)
    assert ssim(picture, picture) == pytest.approx(1, abs=1e-5)
    assert ssim(1 - picture, picture) < 0.9


# ----- pairs


def test_the_worst_picture_and_the_means():
    reference = torch.full((3, 16, 16, 3), 0.5)
    candidate = reference + torch.tensor([0.01, 0.1, 0.001])[:, None, None, None]
    found = compare(reference, candidate)
    assert [pair.psnr for pair in found.pairs] == pytest.approx([40, 20, 60], abs=0.01)
    assert found.worst.number == 2
    assert found.psnr == pytest.approx(40, abs=0.01)
    assert found.ssim == pytest.approx(sum(pair.ssim for pair in found.pairs) / 3)
    assert "3 pictures: mean PSNR 40.0 dB" in found.report
    assert "worst is picture 2: 20.0 dB" in found.report
    assert "picture 2 of 3: PSNR 20.0 dB" in found.caption


def test_equal_pictures_are_identical():
    reference = pictures(2)
    found = compare(reference, reference.clone())
    assert "Verdict: identical." in found.summary
    assert "worst" not in found.summary
    assert found.psnr == MOST_DB
    assert found.ssim == pytest.approx(1, abs=1e-5)


def test_pictures_are_compared_as_they_are_seen():
    """Values outside 0..1 are clipped, and half precision changes only precision."""
    reference = torch.ones(1, 16, 16, 3)
    assert compare(reference, reference * 2).worst.same
    assert compare(reference.half(), reference).worst.same


def test_alpha_counts_like_a_colour():
    """A quarter of the values off by 0.2: 10·log10(4 / 0.04)."""
    reference = torch.full((1, 16, 16, 4), 0.5)
    candidate = reference.clone()
    candidate[..., 3] += 0.2
    found = compare(reference, candidate)
    assert found.psnr == pytest.approx(20, abs=0.01)
    assert not found.worst.same


@pytest.mark.parametrize(
    ("candidate", "got"),
    [
        (pictures(2, 16, 24), "2 pictures of 24 × 16 in 3 channels"),
        (pictures(3), "3 pictures of 16 × 16 in 3 channels"),
        (pictures(1), "1 picture of 16 × 16 in 3 channels"),
        (pictures(2, channels=4), "2 pictures of 16 × 16 in 4 channels"),
    ],
    ids=["size", "more", "fewer", "alpha"],
)
def test_batches_that_do_not_match_are_refused(candidate, got):
    with pytest.raises(SettingError) as caught:
        compare(pictures(2), candidate)
    message = str(caught.value)
    assert f"candidate: got {got}, expected 2 pictures of 16 × 16 in 3 channels" in message


def test_one_reference_is_not_repeated_for_many():
    with pytest.raises(SettingError, match="RepeatImageBatch"):
        compare(pictures(1), pictures(2))


@pytest.mark.parametrize("strange", [pictures(0), pictures(channels=1), pictures(channels=5)])
def test_what_is_no_picture_is_refused(strange):
    with pytest.raises(SettingError, match="3 channels"):
        compare(strange, strange)


def test_progress_goes_by_pictures_and_may_stop_it():
    told = []
    compare(pictures(2), pictures(2), lambda what, done, total: told.append((done, total)))
    assert told == [(0, 2), (1, 2), (2, 2)]

    def cancel(step: Step, done: int, total: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(pictures(2), pictures(2), cancel)


# ----- broken pictures


def test_a_black_picture_is_named_and_is_the_worst():
    """Even where the reference is so dark that the PSNR is high."""
    reference = pictures(3)
    reference[2] = 0.08
    candidate = reference.clone()
    candidate[0] = 1 - candidate[0]
    candidate[2] = 0.5 / 255
    found = compare(reference, candidate)
    assert found.worst.number == 3
    assert found.worst.psnr > found.pairs[0].psnr
    assert "Verdict: broken: picture 3 is black, its reference is not." in found.summary
    assert "picture 3 is black, its reference is not" in found.caption


def test_pictures_with_nan_and_infinity_are_named_and_scored_as_seen():
    reference = torch.full((2, 16, 16, 3), 0.5)
    candidate = reference.clone()
    candidate[0, 0, 0, 0] = math.nan
    candidate[1, 0, 0, :] = -math.inf
    found = compare(reference, candidate)
    assert "picture 1 holds NaN; picture 2 holds infinity" in found.verdict
    # 0.5 away in one and in three of 768 values
    assert [pair.psnr for pair in found.pairs] == pytest.approx(
        [10 * math.log10(768 / 0.25), 10 * math.log10(256 / 0.25)], abs=1e-3
    )
    assert math.isfinite(found.ssim)


def test_a_picture_of_nan_alone_is_black_too():
    found = compare(pictures(), torch.full((1, 16, 16, 3), math.nan))
    assert "picture 1 holds NaN; picture 1 is black, its reference is not" in found.verdict


def test_a_broken_reference_is_named_as_such():
    candidate = pictures(2)
    reference = candidate.clone()
    reference[0] = 0
    reference[1, 4, 4, 1] = math.nan
    verdict = compare(reference, candidate).verdict
    assert "reference 1 is black, its picture is not; reference 2 holds NaN" in verdict


def test_many_faults_are_counted_and_the_report_has_them_all():
    reference = pictures(9)
    found = compare(reference, torch.zeros_like(reference))
    assert "picture 4 is black, its reference is not; and 5 faults more. " in found.verdict
    assert "picture 5" not in found.verdict
    assert all(f"picture {number} is black" in found.report for number in range(1, 10))


def test_two_black_pictures_are_identical():
    black = torch.zeros(1, 16, 16, 3)
    assert compare(black, black.clone()).verdict == "Verdict: identical."


def test_fading_to_black_is_no_fault():
    """Three steps of 255 and zero both count as black."""
    assert compare(torch.full((1, 16, 16, 3), 3 / 255), torch.zeros(1, 16, 16, 3)).worst.faults == ()


def test_alpha_does_not_hide_a_black_picture():
    reference = torch.ones(1, 16, 16, 4)
    candidate = reference.clone()
    candidate[..., :3] = 0
    assert "picture 1 is black" in compare(reference, candidate).verdict


# ----- the verdict


def of(*scores: tuple[float, float]) -> Comparison:
    return Comparison(tuple(Pair(i, psnr, ssim, same=False) for i, (psnr, ssim) in enumerate(scores, 1)))


@pytest.mark.parametrize(
    ("score", "words"),
    [
        ((60, 0.9999), "less than rounding to 8 bits changes"),
        ((52, 0.999), "no difference a viewer would notice"),
        ((44, 0.99), "differences hard to see side by side"),
        ((33, 0.97), "small differences, visible when flipping between the two"),
        ((23, 0.9), "details differ"),
        ((12, 0.3), "another picture"),
        ((52, 0.97), "differences hard to see side by side"),  # SSIM decides when it is worse
        ((100, 0.9999), "less than rounding to 8 bits changes"),  # not equal, so not identical
    ],
)
def test_the_verdict_in_words(score, words):
    assert of(score).verdict == f"Verdict: {words}."


def test_the_verdict_begins_with_the_worst():
    verdict = of((52, 0.999), (12, 0.3), (51, 0.999)).verdict
    assert verdict == "Verdict: picture 2: another picture; 2 pictures: no difference a viewer would notice."


def test_the_levels_fall_and_the_first_two_are_what_8_bits_mean():
    assert [level.psnr for level in LEVELS] == sorted((level.psnr for level in LEVELS), reverse=True)
    assert [level.ssim for level in LEVELS] == sorted((level.ssim for level in LEVELS), reverse=True)
    # Rounding to steps of 1/255 has an error variance of 1/12 of a step squared.
    exact = torch.rand(3, 500, 500, dtype=torch.float64)
    rounded = (exact * 255).round() / 255
    assert psnr(rounded, exact) == pytest.approx(LEVELS[1].psnr, abs=0.05)
    assert psnr(rounded, rounded + 1 / 255) == pytest.approx(LEVELS[2].psnr, abs=0.05)


def test_what_is_said_to_be_usual_is_what_was_measured():
    recorded = json.loads((pack.ROOT / "bench" / "results" / "quality.json").read_text(encoding="utf-8"))["models"]
    rows = {
        "a plain FP8 cast": ["cast"],
        "HSWQ as published": ["published "],
        "model_aware at +3 %": ["model_aware 3 "],
    }
    for what, low, high in USUAL:
        means = [
            sum(row["psnr"]) / len(row["psnr"])
            for scores in recorded.values()
            for row in scores
            if row["method"].startswith(tuple(rows[what])) and not {"fast", "channel"} & set(row["method"].split())
        ]
        assert (low, high) == (round(min(means)), round(max(means))), what


# ----- LPIPS


@pytest.fixture
def torch_cache(tmp_path, monkeypatch) -> Path:
    """An empty torch cache, and no network access."""

    def refused(*_args: object, **_options: object) -> None:
        raise AssertionError("a download was tried")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refused)
    return tmp_path


def test_without_its_backbone_there_is_no_lpips_and_no_download(torch_cache):
    assert lpips_here() is None
    assert "LPIPS" not in compare(pictures(1, 64, 64), pictures(1, 64, 64)).report


def test_lpips_is_what_its_package_says(torch_cache):
    """With random backbone weights: the same number as from the package itself."""
    package = pytest.importorskip("lpips")
    models = pytest.importorskip("torchvision.models")
    file = torch_cache / "hub" / "checkpoints" / "alexnet-owt-7be5be79.pth"
    file.parent.mkdir(parents=True)
    torch.save(models.alexnet(weights=None).state_dict(), file)
    reference, candidate = pictures(2, 64, 48, 4)
    found = compare(reference[None], candidate[None])
    colours = [picture[..., :3].permute(2, 0, 1)[None] for picture in (candidate, reference)]
    expected = package.LPIPS(net="alex", verbose=False)(*colours, normalize=True).item()
    assert found.lpips == pytest.approx(expected, rel=1e-5)
    assert f"LPIPS {expected:.4f}" in found.summary
    assert compare(reference[None], reference[None]).lpips == 0
    assert compare(reference[None, :31, :31], candidate[None, :31, :31]).lpips > 0
    assert compare(reference[None, :30], candidate[None, :30]).lpips is None


# ----- drawings


def test_flicker_alternates_and_changes_nothing():
    reference, candidate = pictures(3, channels=4), pictures(3, channels=4) * 2
    frames = flicker(reference, candidate)
    assert frames.shape == (6, 16, 16, 4)
    assert torch.equal(frames[0::2], reference)
    assert torch.equal(frames[1::2], candidate)


def test_the_heat_map_amplifies_the_largest_difference_of_a_channel():
    reference = torch.full((4, 4, 3), 0.5)
    candidate = reference.clone()
    candidate[1, 2] = torch.tensor([0.5, 0.5 - 0.0625, 0.51])  # 1/16, amplified 8 times: the middle of the colours
    candidate[3, 3, 0] = 0.9  # beyond the brightest
    heat = heat_map(reference, candidate, 8.0)
    assert rgb(heat[1, 2]) == INFERNO[8]
    assert rgb(heat[3, 3]) == INFERNO[16]
    assert rgb(heat[0, 0]) == INFERNO[0]
    assert rgb(heat_map(reference, candidate, 4.0)[1, 2]) == INFERNO[4]


def test_the_colours_are_inferno():
    heat = torch.linspace(0, 1, 256)
    ours = heat_map(torch.zeros(1, 256, 1), heat[None, :, None], 1.0)[0]
    theirs = torch.tensor(mpl.colormaps["inferno"](heat.numpy())[:, :3], dtype=torch.float32)
    assert (ours - theirs).abs().max() < 0.03


@pytest.mark.parametrize("channels", [3, 4])
def test_side_by_side_shows_the_pixels_themselves(channels):
    reference, candidate = pictures(2, 300, 280, channels)
    drawn = side_by_side(reference, candidate, 8.0, "a caption")[0]
    strip, body = drawn[:-300], drawn[-300:]
    assert drawn.shape == (strip.shape[0] + 300, 3 * 280 + 2 * GAP, 3)
    assert torch.equal(body[:, :280], reference[..., :3])
    assert torch.equal(body[:, 280 + GAP : 560 + GAP], candidate[..., :3])
    assert torch.equal(body[:, 560 + 2 * GAP :], heat_map(reference, candidate, 8.0))
    assert strip.max() > 0.8


def test_small_pictures_are_enlarged_pixel_by_pixel():
    reference, candidate = pictures(2, 40, 100)
    drawn = side_by_side(reference, candidate, 8.0, "a caption")[0]
    assert drawn.shape[1] == 3 * 300 + 2 * GAP
    assert torch.equal(drawn[-120::3, :300:3], reference)
    assert torch.equal(drawn[-118::3, 2:300:3], reference)


def test_the_caption_is_never_cut():
    """A narrow picture gets a strip as wide as the text: each added word is visible and ends before the edge."""
    reference, candidate = pictures(2, 900, 10)
    ends = []
    for words in range(6, 12):
        drawn = side_by_side(reference, candidate, 8.0, "a longer caption " * words)[0]
        ends.append((drawn[:-900] > 0.5).any(-1).any(0).nonzero().max().item())
        assert ends[-1] < drawn.shape[1] - 1
    assert all(before + 50 < after for before, after in itertools.pairwise(ends))


def rgb(pixel: torch.Tensor) -> int:
    red, green, blue = (pixel * 255).round().int().tolist()
    return red << 16 | green << 8 | blue
