from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hswq.hswq_core.quant import grid
from hswq.hswq_core.quant.grid import FLOAT8_E4M3FN as GRID
from hswq.hswq_core.quant.grid import WIDEN_LEAST
from hswq.hswq_core.quant.metrics import sqnr_db
from hypothesis import given, settings
from hypothesis import strategies as st

# e4m3fn by its definition: sign, 4 exponent bits with bias 7, 3 mantissa bits, no infinity, 0x7f is NaN.
POSITIVE = [m * 2.0**-9 if e == 0 else (8 + m) * 2.0 ** (e - 10) for e in range(16) for m in range(8)][:127]
MIDPOINTS = [(low + high) / 2 for low, high in pairwise(POSITIVE)]
EVEN_NEIGHBOURS = [code + code % 2 for code in range(126)]  # between codes k and k + 1: the even one


def codes_of(values: list[float] | torch.Tensor) -> list[int]:
    return GRID.cast(torch.as_tensor(values, dtype=torch.float32)).view(torch.uint8).tolist()


def test_every_code_dequantizes_to_its_defined_value():
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    expected = [*POSITIVE, math.nan, *(-v for v in POSITIVE), math.nan]
    torch.testing.assert_close(GRID.dequantize(codes, None), torch.tensor(expected), rtol=0, atol=0, equal_nan=True)


def test_many_finite_codes_take_a_faster_way_to_the_same_values():
    finite = torch.tensor([*range(127), *range(128, 255)], dtype=torch.uint8).view(torch.float8_e4m3fn)
    values = torch.tensor([*POSITIVE, *(-v for v in POSITIVE)])
    times = WIDEN_LEAST // len(finite) + 1
    table, expected = finite.repeat(times, 1), values.repeat(times, 1)
    assert torch.equal(GRID.dequantize(table, None), expected)
    assert torch.equal(GRID.dequantize(table, None).signbit(), expected.signbit())
    assert torch.equal(GRID.dequantize(table.t(), None), expected.t())
    table.view(torch.uint8)[3, 5] = 0x7F  # one NaN among them
    assert GRID.dequantize(table, None).isnan().nonzero().tolist() == [[3, 5]]


def test_values_are_the_253_finite_ones_in_order():
    assert GRID.values().tolist() == sorted({*POSITIVE, *(-v for v in POSITIVE)})
    assert len(GRID.values()) == 253
    assert GRID.max == POSITIVE[-1] == 448.0


def test_every_finite_code_is_cast_to_itself():
    assert codes_of(POSITIVE) == list(range(127))
    assert codes_of([-v for v in POSITIVE]) == list(range(128, 255))


def test_all_126_midpoints_are_cast_to_the_even_code():
    assert len(MIDPOINTS) == 126
    assert codes_of(MIDPOINTS) == EVEN_NEIGHBOURS
    assert codes_of([-v for v in MIDPOINTS]) == [128 + code for code in EVEN_NEIGHBOURS]


def test_the_floats_beside_a_midpoint_are_cast_to_the_nearer_code():
    middle = torch.tensor(MIDPOINTS, dtype=torch.float32)
    assert codes_of(torch.nextafter(middle, torch.tensor(0.0))) == list(range(126))
    assert codes_of(torch.nextafter(middle, torch.tensor(math.inf))) == list(range(1, 127))


def test_codes_and_midpoints_equal_torchs_cast():
    x = torch.tensor([*POSITIVE, *MIDPOINTS])
    x = torch.cat((x, -x))
    assert torch.equal(GRID.cast(x).view(torch.uint8), x.to(torch.float8_e4m3fn).view(torch.uint8))


@pytest.mark.parametrize("scaled", [True, False])
def test_negated_weights_give_the_same_codes_with_the_sign_bit_flipped(scaled):
    w = torch.randn(10_000)
    plus, _ = GRID.quantize(w, 3.0, scaled=scaled)
    minus, _ = GRID.quantize(-w, 3.0, scaled=scaled)
    assert torch.equal(minus.view(torch.uint8), plus.view(torch.uint8) ^ 0x80)


def test_values_beyond_the_grid_saturate():
    assert codes_of([449.0, 464.0, 465.0, 1e30, math.inf]) == [126] * 5
    assert codes_of([-449.0, -464.0, -465.0, -1e30, -math.inf]) == [254] * 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_extremes_of_a_dtype_never_become_nan(dtype):
    limits = torch.finfo(dtype)
    w = torch.tensor([limits.max, limits.min, limits.tiny, limits.smallest_normal / 2, 0.0, -0.0], dtype=dtype)
    for scaled in (True, False):
        assert GRID.fake_quantize(w, limits.max, scaled=scaled).isfinite().all()


@given(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.floats(0, allow_infinity=False, width=32),
    st.booleans(),
)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_no_finite_weight_and_limit_give_nan(weight, amax, scaled):
    assert GRID.fake_quantize(torch.tensor([weight]), amax, scaled=scaled).isfinite().all()


def test_a_zero_tensor_has_scale_1_and_stays_zero():
    codes, scale = GRID.quantize(torch.zeros(2, 3), 0.0, scaled=True)
    assert scale is not None
    assert (scale.item(), scale.dtype, tuple(scale.shape)) == (1.0, torch.float32, ())
    assert GRID.dequantize(codes, scale).count_nonzero() == 0


def test_scale_multiplies_at_dequantize():
    w = torch.tensor([896.0, -2.0, 0.0])
    codes, scale = GRID.quantize(w, 896.0, scaled=True)
    assert scale is not None
    assert scale.item() == 2.0  # 896 / 448
    assert codes.to(torch.float32).tolist() == [448.0, -1.0, 0.0]
    assert GRID.dequantize(codes, scale).tolist() == w.tolist()


def test_scale_of_several_limits_is_elementwise():
    assert GRID.scale(torch.tensor([[448.0], [0.0], [0.875]])).tolist() == [[1.0], [1.0], [2.0**-9]]


def test_unscaled_clips_at_amax_then_rounds():
    codes, scale = GRID.quantize(torch.tensor([0.9, -5.0, 2.0, 300.0]), 2.0, scaled=False)
    assert scale is None
    assert codes.to(torch.float32).tolist() == [0.875, -2.0, 2.0, 2.0]


@pytest.mark.parametrize("amax", [1e-30, 0.003, 0.0931396484375, 1.0, 448.0, 3.3e4])
def test_requantizing_dequantized_codes_is_identity(amax):
    codes = torch.tensor([*range(127), *range(128, 255)], dtype=torch.uint8).view(torch.float8_e4m3fn)
    once = GRID.dequantize(codes, GRID.scale(amax))
    again, scale = GRID.quantize(once, amax, scaled=True)
    assert torch.equal(again.view(torch.uint8), codes.view(torch.uint8))
    from_own_max, _ = GRID.quantize(once, once.abs().max().item(), scaled=True)
    assert torch.equal(from_own_max.view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(GRID.dequantize(again, scale), once)


def test_dequantize_multiplies_in_float32_and_rounds_once():
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn)
    scale = torch.tensor(0.0012345678)
    exact = torch.tensor(POSITIVE, dtype=torch.float64) * scale.double()
    assert torch.equal(GRID.dequantize(codes, scale, torch.float16), exact.to(torch.float32).to(torch.float16))
    in_half = codes.to(torch.float16) * scale.to(torch.float16)
    assert not torch.equal(GRID.dequantize(codes, scale, torch.float16), in_half)


@pytest.mark.parametrize(("scaled", "decibel"), [(True, 31.55), (False, 29.60)])
def test_sqnr_of_a_gaussian_of_std_002(scaled, decibel):
    w = (torch.randn(1024, 1024) * 0.02).bfloat16()
    amax = w.abs().max().item()
    assert sqnr_db(w, GRID.fake_quantize(w, amax, scaled=scaled)) == pytest.approx(decibel, abs=0.15)


@pytest.mark.parametrize("scaled", [True, False])
def test_fake_quantize_is_dequantized_codes_and_leaves_its_input_alone(scaled):
    w = torch.randn(64, 64)
    before = w.clone()
    expected = GRID.dequantize(*GRID.quantize(w, 2.5, scaled=scaled))
    assert torch.equal(GRID.fake_quantize(w, 2.5, scaled=scaled), expected)
    assert torch.equal(w, before)


@pytest.mark.parametrize("piece", [1, 7, 64, 10**6])
@pytest.mark.parametrize("scaled", [True, False])
def test_working_in_pieces_changes_no_code(piece, scaled, monkeypatch):
    w = torch.randn(5, 9, 3).transpose(0, 1)  # not contiguous
    monkeypatch.setattr(grid, "PIECE", piece)
    codes, scale = GRID.quantize(w, 2.5, scaled=scaled)
    expected = (w / scale if scale is not None else w.clamp(-2.5, 2.5)).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert codes.shape == w.shape
    assert torch.equal(codes.to(torch.float32), expected.to(torch.float32))


@pytest.mark.parametrize("shape", [(), (0, 4), (1,)])
def test_scalars_and_empty_weights_keep_their_shape(shape):
    codes, _ = GRID.quantize(torch.ones(shape), 1.0, scaled=True)
    assert codes.shape == shape
    assert (codes.to(torch.float32) == 448.0).all()
