from __future__ import annotations

import math
import weakref

import pytest
import torch
from hswq.hswq_core.calibration.observer import InputSums, LastInput, LayerObserver, LayerStats
from hswq.hswq_core.errors import LayerError
from hswq.hswq_core.model.kinds import KINDS

# Rows of three channels: mean|x_c| = 2, 2, 4; mean x_c = 2, 0, -1; max|x| = 5.
ROWS = [[1.0, -2.0, 3.0], [3.0, 2.0, -5.0]]
ABSOLUTE, MEAN, AMAX = [2.0, 2.0, 4.0], [2.0, 0.0, -1.0], 5.0


def linear(channels: int = 3) -> LayerObserver:
    return LayerObserver("blocks.0.fc", "Linear", (7, channels), channels)


def conv(channels: int = 3) -> LayerObserver:
    return LayerObserver("blocks.0.conv", "Conv2d", (7, channels, 3, 3), channels)


@pytest.mark.parametrize("shape", [(2, 3), (2, 1, 3), (1, 2, 3), (1, 2, 1, 3)])
def test_linear_inputs_of_rank_2_3_and_4_by_hand(shape):
    observer = linear()
    observer.see_input(torch.tensor(ROWS).reshape(shape))
    stats = observer.drain()
    assert stats.importance.tolist() == ABSOLUTE
    assert stats.input_mean.tolist() == MEAN
    assert stats.input_amax == AMAX
    assert stats.in_calls == 1


@pytest.mark.parametrize("shape", [(3, 1, 2), (3, 2, 1), (1, 3, 1, 2), (2, 3, 1, 1)])
def test_conv_inputs_of_rank_3_and_4_by_hand(shape):
    """The same rows as positions of an image, or as two images of one position."""
    rows = torch.tensor(ROWS)
    observer = conv()
    observer.see_input((rows if shape[0] == 2 else rows.T).reshape(shape))
    stats = observer.drain()
    assert stats.importance.tolist() == ABSOLUTE
    assert stats.input_mean.tolist() == MEAN
    assert stats.input_amax == AMAX


def test_a_non_contiguous_input_counts_the_same():
    observer = linear()
    observer.see_input(torch.tensor(ROWS).T.contiguous().T)
    assert observer.drain().importance.tolist() == ABSOLUTE


def test_every_call_weighs_the_same_whatever_its_size():
    """Mean over calls of the mean: 1 row of |x| = 8 and 3 rows of |x| = 2 give 5, not 3.5."""
    observer = linear(1)
    observer.see_input(torch.tensor([[-8.0]]))
    observer.see_input(torch.tensor([[2.0], [-2.0], [2.0]]))
    stats = observer.drain()
    assert stats.importance.tolist() == [5.0]
    assert stats.input_mean.item() == pytest.approx((-8 + 2 / 3) / 2, rel=1e-7)
    assert stats.input_amax == 8.0
    assert stats.in_calls == 2


def test_sensitivity_is_mean_of_squares_minus_square_of_mean_over_calls():
    """Calls [1, 3] and [5]: E[mean y²] = (5 + 25) / 2, E[mean y] = (2 + 5) / 2, so 15 - 12.25."""
    observer = linear()
    observer.see_output(torch.tensor([1.0, 3.0]))
    observer.see_output(torch.tensor([[5.0]]))
    stats = observer.drain()
    assert stats.out_sum == 7.0
    assert stats.out_sq_sum == pytest.approx(30.0, rel=1e-6)
    assert stats.sensitivity == pytest.approx(2.75, rel=1e-6)


def test_sensitivity_is_never_negative_nor_undefined():
    observer = linear()
    for _ in range(7):
        observer.see_output(torch.full((3, 5), 0.1))
    assert 0.0 <= observer.drain().sensitivity < 1e-8
    assert LayerStats.empty("Linear", (7, 3), 3).sensitivity == 0.0


def test_fp16_bf16_and_fp32_feeds_of_the_same_values_agree():
    x = torch.randn(4, 512, 64) * torch.linspace(0.1, 3.0, 64)
    results = {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        observer = linear(64)
        observer.see_input(x.to(dtype))
        observer.see_output(x.to(dtype))
        results[dtype] = observer.drain()
    truth = results[torch.float32]
    for stats in results.values():
        torch.testing.assert_close(stats.importance, truth.importance, rtol=1e-3, atol=0)
        torch.testing.assert_close(stats.input_mean, truth.input_mean, rtol=0, atol=1e-3)
        assert stats.sensitivity == pytest.approx(truth.sensitivity, rel=1e-3)


def test_a_feed_every_dtype_can_represent_gives_the_very_same_sums():
    x = torch.randint(-128, 128, (16, 32)) / 64
    sums = []
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        observer = linear(32)
        observer.see_input(x.to(dtype))
        stats = observer.drain()
        sums.append((stats.abs_sum.tolist(), stats.mean_sum.tolist(), stats.input_amax))
    assert all(other == sums[0] for other in sums)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_outputs_of_any_floating_dtype(dtype):
    observer = linear()
    observer.see_output(torch.tensor([1.0, 3.0], dtype=dtype))
    assert observer.drain().out_sq_sum == pytest.approx(5.0, rel=1e-6)


def test_large_half_precision_inputs_do_not_overflow():
    """Sums of 4,096 × 60,000 are far beyond float16's 65,504."""
    observer = linear(1)
    observer.see_input(torch.full((4096, 1), 60_000.0, dtype=torch.float16))
    observer.see_output(torch.full((4096, 1), 60_000.0, dtype=torch.float16))
    stats = observer.drain()
    assert stats.importance.item() == 60_000.0
    assert stats.out_sq_sum == pytest.approx(3.6e9, rel=1e-6)


def test_sums_over_a_large_call_do_not_drift():
    """A million rows of a constant: a float32 accumulator would be off by up to a per cent."""
    x = torch.full((2**20, 4), 0.37, dtype=torch.float16)
    observer = linear(4)
    observer.see_input(x)
    observer.see_output(x)
    stats = observer.drain()
    torch.testing.assert_close(stats.importance, torch.full((4,), 0.3701171875).double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(stats.input_mean, torch.full((4,), 0.3701171875).double(), rtol=1e-6, atol=0)
    assert stats.out_sq_sum == pytest.approx(0.3701171875**2, rel=1e-6)


def running_mean(value: float, calls: int, dtype: torch.dtype) -> float:
    """The mean as a predecessor keeps it, in the activations' own dtype."""
    x = torch.tensor(value, dtype=dtype)
    mean = torch.zeros((), dtype=dtype)
    for n in range(calls):
        mean = (mean * n + x) / (n + 1)
    return mean.item()


def test_5120_calls_of_a_constant_give_that_constant():
    """256 pictures of 20 steps; 0.37 in float16 is 0.3701171875. A running mean in float16 ends at 0.19995."""
    calls = 5120
    x = torch.full((2, 3), 0.37, dtype=torch.float16)
    assert x[0, 0].item() == 0.3701171875
    observer = linear()
    for _ in range(calls):
        observer.see_input(x)
        observer.see_output(x)
    stats = observer.drain()
    assert (stats.in_calls, stats.out_calls) == (calls, calls)
    torch.testing.assert_close(stats.importance, torch.full((3,), 0.3701171875).double(), rtol=0, atol=1e-4)
    assert stats.out_sum / calls == pytest.approx(0.3701171875, abs=1e-4)
    assert running_mean(0.37, calls, torch.float16) == pytest.approx(0.19995, abs=5e-6)
    assert running_mean(20.0, calls, torch.float16) == math.inf


@pytest.mark.parametrize("shape", [(3,), (2, 2, 2, 2, 3), ()])
def test_a_linear_input_of_another_rank_is_an_error_that_names_the_layer(shape):
    with pytest.raises(LayerError, match=rf"blocks\.0\.fc.*rank {len(shape)}"):
        linear().see_input(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(2, 3), (1, 3, 1, 4, 4)])
def test_a_conv_input_of_another_rank_is_an_error_that_names_the_layer(shape):
    with pytest.raises(LayerError, match=rf"blocks\.0\.conv.*rank {len(shape)}"):
        conv().see_input(torch.zeros(shape))


@pytest.mark.parametrize(("observer", "shape"), [(linear(), (3, 4)), (conv(), (1, 4, 3, 3)), (conv(), (4, 3, 3))])
def test_another_number_of_channels_is_an_error_that_names_the_layer(observer, shape):
    with pytest.raises(LayerError, match=rf"{observer.name}.*got 4, expected 3"):
        observer.see_input(torch.zeros(shape))


def test_a_refused_input_leaves_the_sums_alone():
    observer = linear()
    observer.see_input(torch.tensor(ROWS))
    with pytest.raises(LayerError):
        observer.see_input(torch.zeros(2, 4))
    stats = observer.drain()
    assert (stats.in_calls, stats.importance.tolist()) == (1, ABSOLUTE)


def test_an_empty_call_counts_for_nothing():
    """A batch of zero tokens has no mean; it must neither stop the generation nor poison the sums with NaN."""
    observer = linear()
    observer.see_input(torch.zeros(0, 3))
    observer.see_output(torch.zeros(0, 7))
    observer.see_input(torch.tensor(ROWS))
    stats = observer.drain()
    assert (stats.in_calls, stats.out_calls) == (1, 0)
    assert stats.importance.tolist() == ABSOLUTE
    assert stats.is_finite()


def test_sums_made_in_inference_mode_can_be_updated_outside_and_back():
    observer = linear()
    with torch.inference_mode():
        observer.see_input(torch.tensor(ROWS))
        observer.see_output(torch.tensor([1.0, 3.0]))
    observer.see_input(torch.tensor(ROWS))
    observer.see_output(torch.tensor([1.0, 3.0]))
    with torch.inference_mode():
        observer.see_input(torch.tensor(ROWS))
        stats = observer.drain()
    whole = LayerStats.empty("Linear", (7, 3), 3)
    whole.merge(stats)
    whole.merge(stats)
    assert whole.importance.tolist() == ABSOLUTE
    assert (whole.in_calls, whole.out_calls) == (6, 4)


def test_drain_resets():
    observer = linear()
    observer.see_input(torch.tensor(ROWS))
    observer.see_output(torch.tensor([4.0]))
    observer.drain()
    empty = observer.drain()
    assert (empty.in_calls, empty.out_calls, empty.out_sum, empty.out_sq_sum, empty.input_amax) == (0, 0, 0.0, 0.0, 0.0)
    assert empty.abs_sum.tolist() == empty.mean_sum.tolist() == [0.0, 0.0, 0.0]
    observer.see_input(torch.ones(1, 3))
    assert observer.drain().importance.tolist() == [1.0, 1.0, 1.0]


def test_drained_parts_merge_to_the_whole():
    x = torch.randn(6, 10, 3)
    whole, parts, merged = linear(), linear(), LayerStats.empty("Linear", (7, 3), 3)
    for i, call in enumerate(x):
        whole.see_input(call)
        whole.see_output(call)
        parts.see_input(call)
        parts.see_output(call)
        if i in (1, 4, 5):
            merged.merge(parts.drain())
    expected = whole.drain()
    torch.testing.assert_close(merged.abs_sum, expected.abs_sum, rtol=1e-14, atol=0)
    torch.testing.assert_close(merged.mean_sum, expected.mean_sum, rtol=0, atol=1e-14)
    assert merged.sensitivity == pytest.approx(expected.sensitivity, rel=1e-12)
    assert merged.input_amax == expected.input_amax == x.abs().max().item()
    assert (merged.in_calls, merged.out_calls) == (6, 6)


def test_the_activations_are_left_alone_and_not_kept():
    observer = linear()
    x = torch.tensor(ROWS)
    observer.see_input(x)
    assert x.tolist() == ROWS
    x.fill_(99.0)  # as models do that add into their activations later
    assert observer.drain().importance.tolist() == ABSOLUTE


def test_no_activation_is_kept_alive():
    observer = linear()
    x, y = torch.tensor(ROWS), torch.ones(2, 7)
    kept = weakref.ref(x), weakref.ref(y)
    observer.see_input(x)
    observer.see_output(y)
    del x, y
    assert [ref() for ref in kept] == [None, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_fetched_while_the_model_runs(dtype):
    """Tensors of the meta device have no values: what waits for one is an error."""
    observer = linear()
    for rows in (2, 2, 2, 5, 2, 2, 2, 2):
        observer.see_input(torch.ones(rows, 3, dtype=dtype, device="meta"))
        observer.see_output(torch.ones(rows, 7, dtype=dtype, device="meta"))
    with pytest.raises(NotImplementedError, match="meta"):
        observer.drain()


@pytest.mark.parametrize("size", [16, 64, 80])
def test_outputs_of_convolutions_of_any_size(size):
    """Short rows are joined to longer ones, but not without end."""
    y = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    observer = conv()
    observer.see_output(y)
    stats = observer.drain()
    assert stats.out_sum == pytest.approx(y.double().mean().item(), abs=1e-7)
    assert stats.out_sq_sum == pytest.approx(y.double().square().mean().item(), rel=1e-6)


@pytest.fixture
def counted(monkeypatch) -> list[tuple[int, ...]]:
    """Shapes of the inputs that are really measured."""
    seen: list[tuple[int, ...]] = []
    measure = InputSums.of

    def count(x: torch.Tensor, axis: int) -> InputSums:
        seen.append(tuple(x.shape))
        return measure(x, axis)

    monkeypatch.setattr(InputSums, "of", count)
    return seen


@pytest.mark.parametrize("inference", [False, True])
def test_an_input_that_layers_share_is_measured_once(counted, inference):
    last = LastInput()
    q, k, v, other = (LayerObserver(name, "Linear", (7, 3), 3, last) for name in "qkvo")
    with torch.inference_mode(inference):
        x = torch.tensor(ROWS)
        for observer in (q, k, v):
            observer.see_input(x)
        other.see_input(x * 2)
        q.see_input(x)
    assert len(counted) == 3
    alone = linear()
    alone.see_input(torch.tensor(ROWS))
    expected = alone.drain()
    for observer, calls in ((q, 2), (k, 1), (v, 1)):
        stats = observer.drain()
        assert stats.in_calls == calls
        assert torch.equal(stats.abs_sum, expected.abs_sum * calls)
        assert torch.equal(stats.mean_sum, expected.mean_sum * calls)
        assert stats.input_amax == expected.input_amax
    assert other.drain().importance.tolist() == [2 * value for value in ABSOLUTE]


def test_an_equal_input_or_one_changed_in_place_is_another(counted):
    last = LastInput()
    first, second = (LayerObserver(name, "Linear", (7, 3), 3, last) for name in "ab")
    x = torch.tensor(ROWS)
    first.see_input(x)
    second.see_input(x.clone())
    second.see_input(x.mul_(3))
    first.see_input(x)
    x.add_(1)
    first.see_input(x)
    assert len(counted) == 4  # of five: the fourth was the third again


def test_the_channels_of_a_shared_input_are_each_layers_own(counted):
    last, x = LastInput(), torch.randn(3, 4, 3)
    rows, image = LayerObserver("a", "Linear", (7, 3), 3, last), LayerObserver("b", "Conv2d", (7, 3, 1, 1), 3, last)
    rows.see_input(x)
    image.see_input(x)
    assert len(counted) == 2
    torch.testing.assert_close(rows.drain().importance, x.abs().double().mean((0, 1)))
    torch.testing.assert_close(image.drain().importance, x.abs().double().mean((1, 2)))


def test_a_shared_input_lives_until_the_next_or_the_end_of_the_call():
    last = LastInput()
    observer = LayerObserver("a", "Linear", (7, 3), 3, last)
    first, second = torch.tensor(ROWS), torch.tensor(ROWS)
    kept = weakref.ref(first), weakref.ref(second)
    observer.see_input(first)
    del first
    assert kept[0]() is not None
    observer.see_input(second)
    del second
    assert kept[0]() is None
    last.clear()
    assert kept[1]() is None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_broken_generation_is_noticed(bad):
    observer = linear()
    observer.see_input(torch.tensor([[bad, 1.0, 1.0]]))
    assert not observer.drain().is_finite()
    observer.see_output(torch.tensor([bad]))
    assert not observer.drain().is_finite()
    observer.see_input(torch.ones(1, 3))
    assert observer.drain().is_finite()


@pytest.mark.parametrize(
    ("kind", "rank", "axis"), [("Linear", 2, 1), ("Linear", 3, 2), ("Linear", 4, 3), ("Conv2d", 3, 0), ("Conv2d", 4, 1)]
)
def test_channel_axis(kind, rank, axis):
    assert KINDS[kind].channel_axis(rank, "layer") == axis
