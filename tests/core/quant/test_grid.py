from __future__ import annotations

import math
from itertools import pairwise

import torch
from hswq.hswq_core.quant.grid import FLOAT8_E4M3FN as GRID
from hswq.hswq_core.quant.grid import WIDEN_LEAST

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


def test_values_beyond_the_grid_saturate():
    assert codes_of([449.0, 464.0, 465.0, 1e30, math.inf]) == [126] * 5
    assert codes_of([-449.0, -464.0, -465.0, -1e30, -math.inf]) == [254] * 5


def test_negated_values_give_the_same_codes_with_the_sign_bit_flipped():
    x = torch.randn(10_000) * 100
    assert torch.equal(GRID.cast(-x).view(torch.uint8), GRID.cast(x).view(torch.uint8) ^ 0x80)


def test_the_largest_code_but_for_the_sign():
    codes = torch.arange(256, dtype=torch.uint8)
    finite = codes[(codes & 0x7F) != 0x7F].view(torch.float8_e4m3fn)
    assert GRID.largest_code(finite) == GRID.max_code == codes_of([GRID.max])[0]
    assert GRID.largest_code(codes.view(torch.float8_e4m3fn)) == GRID.nan_code
    assert GRID.largest_code(torch.tensor([math.nan]).to(torch.float8_e4m3fn)) == GRID.nan_code
    assert GRID.largest_code(torch.tensor([[-3.0, 1.0]]).to(torch.float8_e4m3fn)) == codes_of([3.0])[0]
    assert GRID.largest_code(torch.empty(0, 4, dtype=torch.float8_e4m3fn)) == 0


def test_a_zero_limit_has_scale_1():
    assert (GRID.scale(0.0).item(), GRID.scale(0.0).dtype, tuple(GRID.scale(0.0).shape)) == (1.0, torch.float32, ())


def test_scale_of_several_limits_is_elementwise():
    assert GRID.scale(torch.tensor([[448.0], [0.0], [0.875]])).tolist() == [[1.0], [1.0], [2.0**-9]]


def test_dequantize_multiplies_in_float32_and_rounds_once():
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn)
    scale = torch.tensor(0.0012345678)
    exact = torch.tensor(POSITIVE, dtype=torch.float64) * scale.double()
    assert torch.equal(GRID.dequantize(codes, scale, torch.float16), exact.to(torch.float32).to(torch.float16))
    in_half = codes.to(torch.float16) * scale.to(torch.float16)
    assert not torch.equal(GRID.dequantize(codes, scale, torch.float16), in_half)
