"""What every scheme answers, and the rows of the table."""

from __future__ import annotations

import pytest
import torch
from hswq.hswq_core.errors import SettingError
from hswq.hswq_core.quant import grid
from hswq.hswq_core.quant.grid import FLOAT8_DTYPES
from hswq.hswq_core.quant.grid import FLOAT8_E4M3FN as GRID
from hswq.hswq_core.quant.metrics import sqnr_db
from hswq.hswq_core.quant.schemes import scheme as scheme_module
from hswq.hswq_core.quant.schemes.scheme import CHANNEL, TENSOR
from hswq.hswq_core.quant.schemes.table import SCHEMES, holds_codes, scheme_named, scheme_stored
from hypothesis import given, settings
from hypothesis import strategies as st

FP8, CAST = SCHEMES["fp8"], SCHEMES["fp8_cast"]
ALL_CODES = torch.tensor([*range(127), *range(128, 255)], dtype=torch.uint8).view(torch.float8_e4m3fn)
SHAPES = [(16, 12), (1, 7), (6, 4, 3, 3), (5, 1, 1, 1)]

FP8_ROWS = {name: row for name, row in SCHEMES.items() if row.dtype == GRID.dtype}

each = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
each_of_fp8 = pytest.mark.parametrize("scheme", FP8_ROWS.values(), ids=FP8_ROWS)
one_a_tensor = pytest.mark.parametrize("scheme", [FP8, CAST], ids=["fp8", "fp8_cast"])


def raw(codes: torch.Tensor) -> torch.Tensor:
    return codes.view(torch.uint8)


def test_fp8_comes_with_a_scale_a_tensor_or_a_channel_or_none():
    assert [(name, row.scaled, row.granularity) for name, row in FP8_ROWS.items()] == [
        ("fp8", True, TENSOR),
        ("fp8_channel", True, CHANNEL),
        ("fp8_cast", False, TENSOR),
    ]


# Rounding to nearest


@each_of_fp8
def test_negated_weights_give_the_same_codes_with_the_sign_bit_flipped(scheme):
    w = torch.randn(100, 100)
    plus, minus = (scheme.nearest_tensors(v, 3.0)["weight"] for v in (w, -w))
    assert torch.equal(raw(minus), raw(plus) ^ 0x80)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@each
def test_the_extremes_of_a_dtype_never_become_nan(scheme, dtype):
    limits = torch.finfo(dtype)
    w = torch.tensor([limits.max, limits.min, limits.tiny, limits.smallest_normal / 2, 0.0, -0.0], dtype=dtype)
    for weight in (w[None], w[:, None]):
        assert scheme.fake_quantize(weight, limits.max).isfinite().all()


@given(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.floats(0, allow_infinity=False, width=32),
    st.sampled_from(list(SCHEMES.values())),
)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_no_finite_weight_and_limit_give_nan(weight, amax, scheme):
    assert scheme.fake_quantize(torch.tensor([[weight]]), amax).isfinite().all()


@each
def test_a_zero_tensor_stays_zero_in_steps_of_1(scheme):
    for amax in (0.0, None):
        assert scheme.fake_quantize(torch.zeros(2, 3), amax).count_nonzero() == 0
        assert scheme.steps(torch.zeros(2, 3), amax).unit.unique().tolist() == [1.0]


def test_a_zero_tensor_has_scale_1():
    scale = FP8.nearest_tensors(torch.zeros(2, 3), 0.0)["weight_scale"]
    assert (scale.item(), scale.dtype, tuple(scale.shape)) == (1.0, torch.float32, ())


def test_scale_multiplies_at_dequantize():
    w = torch.tensor([896.0, -2.0, 0.0])
    tensors = FP8.nearest_tensors(w, 896.0)
    assert tensors["weight_scale"].item() == 2.0  # 896 / 448
    assert tensors["weight"].to(torch.float32).tolist() == [448.0, -1.0, 0.0]
    assert GRID.dequantize(tensors["weight"], tensors["weight_scale"]).tolist() == w.tolist()
    assert FP8.restored(tensors).tolist() == w.tolist()


def test_unscaled_clips_at_amax_then_rounds():
    tensors = CAST.nearest_tensors(torch.tensor([0.9, -5.0, 2.0, 300.0]), 2.0)
    assert set(tensors) == {"weight"}
    assert tensors["weight"].to(torch.float32).tolist() == [0.875, -2.0, 2.0, 2.0]


def test_a_scale_a_channel_is_that_of_its_own_largest_weight_but_for_the_limit():
    w = torch.tensor([[448.0, -1.0], [8.0, -896.0], [0.0, 0.0]])
    scheme = SCHEMES["fp8_channel"]
    tensors = scheme.nearest_tensors(w)
    assert (tensors["weight_scale"].dtype, tensors["weight_scale"].tolist()) == (torch.float32, [[1.0], [2.0], [1.0]])
    assert tensors["weight"].to(torch.float32).tolist() == [[448.0, -1.0], [4.0, -448.0], [0.0, 0.0]]
    assert torch.equal(scheme.restored(tensors), w)
    limited = scheme.nearest_tensors(w, 448.0)
    assert limited["weight_scale"].flatten().tolist() == [1.0, 1.0, 1.0]
    assert limited["weight"].to(torch.float32).tolist() == [[448.0, -1.0], [8.0, -448.0], [0.0, 0.0]]
    assert scheme.steps(w[:, :, None, None]).unit.shape == (3, 1, 1, 1)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_scale_a_channel_rounds_each_row_like_a_tensor_of_its_own(shape):
    w = torch.randn(shape) * torch.logspace(-3, 3, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    found = SCHEMES["fp8_channel"].fake_quantize(w)
    assert torch.equal(found, torch.stack([FP8.fake_quantize(row) for row in w]))


@pytest.mark.parametrize("amax", [1e-30, 0.003, 0.0931396484375, 1.0, 448.0, 3.3e4])
def test_requantizing_dequantized_codes_is_identity(amax):
    once = GRID.dequantize(ALL_CODES, GRID.scale(amax))
    again = FP8.nearest_tensors(once, amax)
    assert torch.equal(raw(again["weight"]), raw(ALL_CODES))
    for own_max in (once.abs().max().item(), None):
        assert torch.equal(raw(FP8.nearest_tensors(once, own_max)["weight"]), raw(ALL_CODES))
    assert torch.equal(GRID.dequantize(again["weight"], again["weight_scale"]), once)


@each_of_fp8
def test_the_values_of_all_codes_are_nearest_to_themselves(scheme):
    values = scheme.widen(ALL_CODES)
    assert torch.equal(raw(scheme.cast(values)), raw(ALL_CODES))
    assert torch.equal(scheme.nearest(values), values)


@pytest.mark.parametrize(("scheme", "decibel"), [(FP8, 31.55), (CAST, 29.60)], ids=["fp8", "fp8_cast"])
def test_sqnr_of_a_gaussian_of_std_002(scheme, decibel):
    w = (torch.randn(1024, 1024) * 0.02).bfloat16()
    amax = w.abs().max().item()
    assert sqnr_db(w, scheme.fake_quantize(w, amax)) == pytest.approx(decibel, abs=0.15)


@each_of_fp8
def test_fake_quantize_is_dequantized_codes_and_leaves_its_input_alone(scheme):
    w = torch.randn(64, 64)
    before = w.clone()
    tensors = scheme.nearest_tensors(w, 2.5)
    expected = GRID.dequantize(tensors["weight"], tensors.get("weight_scale"))
    assert torch.equal(scheme.fake_quantize(w, 2.5), expected)
    assert torch.equal(scheme.rounded(w, scheme.steps(w, 2.5)), expected)
    assert torch.equal(scheme.restored(tensors), expected)
    assert torch.equal(w, before)
    assert torch.equal(tensors["weight"].to(torch.float32), scheme.nearest_tensors(w, 2.5)["weight"].to(torch.float32))


@pytest.mark.parametrize("piece", [1, 7, 64, 10**6])
@each_of_fp8
def test_working_in_pieces_changes_no_code(scheme, piece, monkeypatch):
    w = torch.randn(5, 9, 3).transpose(0, 1)  # not contiguous
    monkeypatch.setattr(grid, "PIECE", piece)
    monkeypatch.setattr(scheme_module, "PIECE", piece)
    tensors = scheme.nearest_tensors(w, 2.5)
    codes, scale = tensors["weight"], tensors.get("weight_scale")
    expected = (w / scale if scale is not None else w.clamp(-2.5, 2.5)).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert codes.shape == w.shape
    assert torch.equal(codes.to(torch.float32), expected.to(torch.float32))
    steps = scheme.steps(w, 2.5)
    parts = list(steps.pieces(w))
    assert torch.equal(torch.cat([part.flatten() for part, _ in parts]), w.flatten())
    rounded = torch.cat([scheme.rounded(*part).flatten() for part in parts])
    assert torch.equal(rounded.reshape(w.shape), scheme.rounded(w, steps))


@pytest.mark.parametrize("shape", [(), (0, 4), (1,)])
@one_a_tensor
def test_scalars_and_empty_weights_keep_their_shape(scheme, shape):
    codes = scheme.nearest_tensors(torch.ones(shape), 1.0)["weight"]
    assert codes.shape == shape
    assert (codes.to(torch.float32) == (448.0 if scheme.scaled else 1.0)).all()


def test_an_empty_weight_of_channels_keeps_its_shape():
    tensors = SCHEMES["fp8_channel"].nearest_tensors(torch.ones(0, 4))
    assert (tensors["weight"].shape, tensors["weight_scale"].shape) == ((0, 4), (0, 1))


# Steps


@one_a_tensor
def test_without_a_limit_the_steps_are_those_of_the_largest_weight(scheme):
    w = torch.randn(8, 9)
    assert torch.equal(scheme.steps(w).unit, scheme.steps(w, w.abs().max().item()).unit)
    assert torch.equal(scheme.fake_quantize(w), scheme.fake_quantize(w, w.abs().max().item()))


def test_limits_of_any_shape_map_onto_the_largest_code():
    limits = torch.tensor([[448.0], [0.0], [0.875]])
    for name in ("fp8", "fp8_channel"):
        steps = SCHEMES[name].limited(limits)
        assert (steps.unit.tolist(), steps.limit) == ([[1.0], [1.0], [2.0**-9]], None)
    steps = CAST.limited(limits)
    assert (steps.unit.tolist(), steps.limit.tolist()) == (1.0, limits.tolist())


@each_of_fp8
def test_the_plain_limit_has_steps_of_1(scheme):
    assert scheme.plain_limit == 448.0
    assert scheme.limited(scheme.plain_limit).unit.item() == 1.0


@each_of_fp8
def test_a_weight_in_steps_is_that_weight_again_times_the_steps(scheme):
    w = torch.randn(16, 12).half()
    steps = scheme.steps(w)
    values = scheme.into(w, steps)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values * steps.unit, w.float())
    top = 448.0 if scheme.scaled else w.abs().max().item()
    assert values.abs().max().item() == pytest.approx(top, rel=1e-6)


# What a file holds


@pytest.mark.parametrize("shape", SHAPES)
@each
def test_what_is_described_is_what_is_made(scheme, shape):
    described, made = scheme.described(shape), scheme.nearest_tensors(torch.randn(shape))
    assert list(described) == list(made) == (["weight", "weight_scale"] if scheme.scaled else ["weight"])
    for name, tensor in made.items():
        assert described[name].device.type == "meta"
        assert (described[name].dtype, described[name].shape) == (tensor.dtype, tensor.shape)
    assert scheme.code_bytes(shape) == made["weight"].nbytes
    scales = made["weight_scale"].nbytes if scheme.granularity == CHANNEL else 0
    assert scheme.nbytes(shape) == made["weight"].nbytes + scales


@pytest.mark.parametrize("shape", SHAPES)
@each
def test_scales_are_restored_in_any_shape_that_files_have_them_in(scheme, shape):
    tensors = scheme.nearest_tensors(torch.randn(shape))
    flat = {name: tensor.reshape(-1) if name == "weight_scale" else tensor for name, tensor in tensors.items()}
    assert torch.equal(scheme.restored(flat), scheme.restored(tensors))


@pytest.mark.parametrize("full", [True, False])
@each_of_fp8
def test_the_marker_names_the_codes_of_what_has_a_scale(scheme, full):
    marker = scheme.marker(full_precision=full)
    expected = {"format": "float8_e4m3fn", "full_precision_matrix_mult": full}
    assert marker == (expected if scheme.scaled else None)


def test_inputs_become_what_8_bits_make_of_them_in_their_own_dtype():
    x = torch.randn(64, 32).half()
    scale = torch.tensor(2.0, dtype=torch.float32) / 448
    expected = ((x.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale).half()
    assert torch.equal(FP8.activations(x, 2.0), expected)


# The table


@pytest.mark.parametrize("name", ["", "FP8", "int4", "../fp8"])
def test_another_name_is_an_error_that_lists_them(name):
    with pytest.raises(SettingError, match="fp8 or fp8_channel or fp8_cast"):
        scheme_named(name)


@each
def test_a_row_is_found_by_its_name(scheme):
    assert scheme_named(scheme.name) is scheme


@each
def test_a_scheme_is_told_by_what_it_stores(scheme):
    tensors = scheme.nearest_tensors(torch.randn(16, 12))
    scales = tensors["weight_scale"].numel() if scheme.scaled else 0
    for number_format in (None, "float8_e4m3fn"):
        assert scheme_stored(tensors["weight"].dtype, scales, number_format) is scheme
    assert scheme_stored(tensors["weight"].dtype, scales, "mxfp8") is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e5m2, torch.uint8])
@pytest.mark.parametrize("scales", [0, 1, 16])
def test_what_no_row_stores_is_no_scheme(dtype, scales):
    assert scheme_stored(dtype, scales) is None


def test_codes_are_told_by_their_dtype():
    assert all(holds_codes(dtype) for dtype in FLOAT8_DTYPES | {row.dtype for row in SCHEMES.values()})
    assert not any(holds_codes(dtype) for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.int64))


@each
def test_what_a_scheme_is_judged_against_has_codes_of_the_same_size(scheme):
    if scheme.judged_against:
        other = scheme_named(scheme.judged_against)
        assert (other.scaled, other.dtype, other.code_bytes((3, 5))) == (True, scheme.dtype, scheme.code_bytes((3, 5)))
