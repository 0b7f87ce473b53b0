from __future__ import annotations

import pytest
import torch
from hswq.hswq_core.errors import LayerError
from hswq.hswq_core.methods.solve import COMPENSATED, NEAREST, UNSOLVED, Solution, bias_correction, solve, unsolved
from hswq.hswq_core.model.layer import Layer
from hswq.hswq_core.quant.grid import FLOAT8_E4M3FN
from hswq.hswq_core.quant.moments import Gram, Moments, output_error
from hswq.hswq_core.quant.schemes.scheme import CODES, SCALE
from hswq.hswq_core.quant.schemes.table import SCHEMES

GRID = FLOAT8_E4M3FN
FP8 = SCHEMES["fp8"]


def moments(x: torch.Tensor) -> Moments:
    gram = Gram("l", x.shape[1])
    gram.add(x)
    return gram.moments()


def inputs(width: int, rows: int, shift: float = 0.0) -> torch.Tensor:
    """Correlated rows, as activations are."""
    mixing = torch.randn(8, width, generator=torch.Generator().manual_seed(7))
    return torch.randn(rows, 8) @ mixing + 0.3 * torch.randn(rows, width) + shift


def solved(
    w: torch.Tensor, fit: torch.Tensor, held: torch.Tensor, *, scaled: bool = True, bias: bool = False
) -> Solution:
    layer = Layer("l", "Linear" if w.dim() == 2 else "Conv2d", tuple(w.shape), w.dtype)
    scheme = SCHEMES["fp8" if scaled else "fp8_cast"]
    found = solve(layer, w, moments(fit), moments(held), scheme=scheme, has_bias=bias)
    assert (found.scheme, set(found.tensors)) == (scheme.name, {CODES, SCALE} if scaled else {CODES})
    return found


def weight_of(found: Solution) -> torch.Tensor:
    return found.restored(torch.device("cpu"))


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("shape", [(32, 48), (16, 4, 3, 3)])
def test_compensation_wins_on_inputs_it_has_not_seen(shape, scaled):
    w = torch.randn(shape) * 0.1
    width = w[0].numel()
    found = solved(w, inputs(width, 4000), inputs(width, 1000), scaled=scaled)
    assert found.how == COMPENSATED
    assert found.codes.dtype == GRID.dtype
    assert found.codes.shape == w.shape
    assert found.error < 0.3 * found.nearest_error


def test_errors_are_those_of_the_stored_codes():
    w, held = torch.randn(32, 48), inputs(48, 1000)
    found = solved(w, inputs(48, 4000), held)
    wanted = output_error(weight_of(found) - w, moments(held).gram) / output_error(w, moments(held).gram)
    assert found.error == pytest.approx(wanted, rel=1e-4)
    nearest = FP8.fake_quantize(w, w.abs().max().item())
    wanted = output_error(nearest - w, moments(held).gram) / output_error(w, moments(held).gram)
    assert found.nearest_error == pytest.approx(wanted, rel=1e-4)


def test_inputs_of_another_kind_give_nearest():
    """Rounded for inputs that never come: compensation loses on those that do."""
    w = torch.randn(32, 48)
    found = solved(w, inputs(48, 4000), torch.randn(1000, 48))
    assert found.how == NEAREST
    assert torch.equal(weight_of(found), FP8.fake_quantize(w, w.abs().max().item()))
    assert found.error == found.nearest_error


def test_few_rows_are_hardly_believed():
    """A layer of 512 columns that saw one row is rounded almost to nearest."""
    w = torch.randn(64, 512)
    nearest = FP8.fake_quantize(w, w.abs().max().item())
    few, many = (solved(w, inputs(512, rows), inputs(512, 2000)) for rows in (1, 4000))
    changed = [(weight_of(found) != nearest).float().mean().item() for found in (few, many)]
    assert changed[0] < changed[1] / 2


@pytest.mark.parametrize("scaled", [True, False])
def test_the_largest_weight_keeps_the_scale(scaled):
    """ComfyUI requantizes small layers with a scale measured anew: the same one."""
    w = torch.randn(32, 48)
    found = solved(w, inputs(48, 4000), inputs(48, 1000), scaled=scaled)
    rounded = weight_of(found)
    if scaled:
        assert rounded.abs().max().item() == pytest.approx(w.abs().max().item(), rel=1e-6)
        again = FP8.nearest_tensors(rounded, rounded.abs().max().item())["weight"]
        assert torch.equal(again.float(), found.codes.float())
    else:
        assert found.scale is None


def test_the_bias_takes_up_the_mean_change():
    w, fit, held = torch.randn(32, 48), inputs(48, 4000, 2.0), inputs(48, 1000, 2.0)
    found = solved(w, fit, held, bias=True)
    delta = weight_of(found) - w
    torch.testing.assert_close(found.bias, -(delta @ fit.mean(0)), atol=1e-5, rtol=1e-4)
    changed = (held @ delta.T).square().mean()
    corrected = (held @ delta.T + found.bias).square().mean()
    assert corrected < changed


def test_no_bias_where_there_is_none_to_correct_or_it_does_not_help():
    w = torch.randn(32, 48)
    assert solved(w, inputs(48, 400), inputs(48, 400)).bias is None
    delta = torch.randn(32, 48) * 0.01
    fit, held = moments(inputs(48, 400, 1.0)), moments(inputs(48, 400, -1.0))
    assert bias_correction(delta, fit, held) is None
    assert bias_correction(delta, fit, fit) is not None


def test_a_grouped_convolution_is_rounded_to_nearest():
    w = torch.randn(16, 2, 3, 3)  # two groups of two channels: its inputs have 36 columns
    fit, held = inputs(36, 4000, 1.0), inputs(36, 1000, 1.0)
    found = solved(w, fit, held, bias=True)
    assert found.how == NEAREST
    delta = (weight_of(found) - w).flatten(1)
    change = torch.cat([held[:, :18] @ delta[:8].T, held[:, 18:] @ delta[8:].T], 1)
    signal = torch.cat([held[:, :18] @ w[:8].flatten(1).T, held[:, 18:] @ w[8:].flatten(1).T], 1)
    assert found.error == pytest.approx((change.square().sum() / signal.square().sum()).item(), rel=1e-3)
    assert (change + found.bias).square().mean() < change.square().mean()


def test_a_weight_that_is_not_finite_is_an_error_that_names_the_layer():
    w = torch.randn(32, 48)
    w[0, 0] = torch.nan
    with pytest.raises(LayerError, match="Layer l, weight: got NaN"):
        solved(w, inputs(48, 100), inputs(48, 100))


def test_a_scale_a_channel_serves_rows_of_unequal_size():
    """A row a millionth of the largest one is next to nothing in units of its scale."""
    w = torch.randn(32, 48) * torch.logspace(-6, 0, 32)[:, None]
    layer = Layer("l", "Linear", (32, 48), w.dtype)
    fit, held = inputs(48, 4000), inputs(48, 1000)

    def found(name: str) -> Solution:
        return solve(layer, w, moments(fit), moments(held), scheme=SCHEMES[name], has_bias=True)

    one, each = found("fp8"), found("fp8_channel")
    assert (one.scale.shape, each.scale.shape) == ((), (32, 1))
    torch.testing.assert_close(each.scale, w.abs().amax(1, keepdim=True) / 448)
    lost = [(weight_of(solution) - w).norm(dim=1) / w.norm(dim=1) for solution in (one, each)]
    assert lost[0][0] > 0.5
    assert lost[1].max() < 0.1
    # ComfyUI, requantizing, measures the same scales.
    torch.testing.assert_close(weight_of(each).abs().amax(1), w.abs().amax(1), rtol=1e-6, atol=0)
    wanted = moments(held).error(weight_of(each) - w) / moments(held).error(w)
    assert each.error == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_without_memory_for_its_inputs_a_layer_is_nearest_with_the_error_of_its_weight(scheme):
    w = torch.randn(32, 48).half()
    layer = Layer("l", "Linear", (32, 48), w.dtype)
    found = unsolved(layer, w, scheme)
    assert (found.scheme, found.how, found.bias, found.damping, found.dead) == (scheme.name, UNSOLVED, None, 0.0, 0)
    assert torch.equal(weight_of(found), scheme.fake_quantize(w))
    wanted = (weight_of(found) - w.float()).double().square().sum() / w.double().square().sum()
    assert found.error == found.nearest_error == pytest.approx(wanted.item(), rel=1e-4)
    w[0, 0] = torch.inf
    with pytest.raises(LayerError, match="Layer l, weight: got NaN"):
        unsolved(layer, w, scheme)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("bias", [None, torch.ones(32)])
def test_a_solution_on_another_device_is_the_same(scheme, bias):
    found = Solution(scheme.name, scheme.nearest_tensors(torch.randn(32, 48)), NEAREST, bias, 0.25, 0.5, 0.01, 7)
    moved = found.to(torch.device("meta"))
    assert {name: tensor.device.type for name, tensor in moved.tensors.items()} == dict.fromkeys(found.tensors, "meta")
    assert (moved.bias is None) == (bias is None)
    assert bias is None or moved.bias.device.type == "meta"
    for name in ("scheme", "how", "error", "nearest_error", "damping", "dead"):
        assert getattr(moved, name) == getattr(found, name)
    assert all(tensor.device.type == "cpu" for tensor in found.tensors.values())
