"""What quantized files hold, ours and others': by which scheme a weight is stored, and what it is restored to."""

from __future__ import annotations

import json

import pytest
import torch
from hswq.hswq_core.errors import FileError
from hswq.hswq_core.plan.formats import FORMATS, SCALE_SUFFIXES
from hswq.hswq_core.quant.schemes.scheme import CHANNEL, TENSOR
from hswq.hswq_core.quant.schemes.table import SCHEMES
from hswq.hswq_core.reports.inspect import QuantizedFile, compare, findings
from safetensors.torch import save_file

FP8 = SCHEMES["fp8"]


@pytest.fixture
def file_of(tmp_path):
    """Call with tensors."""

    def made(**tensors: torch.Tensor) -> QuantizedFile:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / "made.safetensors")
        return QuantizedFile(tmp_path / "made.safetensors")

    return made


def marker(text: str) -> torch.Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


@pytest.mark.parametrize("granularity", [TENSOR, CHANNEL])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", [(16, 12), (8, 4, 3, 3)])
def test_a_layer_of_every_format_is_known_and_restored(name, granularity, shape, file_of):
    row, kind = FORMATS[name], "Linear" if len(shape) == 2 else "Conv2d"
    scheme = row.scheme(kind, granularity) or row.usual(kind)
    w = torch.randn(shape)
    tensors = row.spelled(scheme, scheme.nearest_tensors(w), None)
    file = file_of(**{f"a.b.{key}": tensor for key, tensor in tensors.items()})
    assert file.quantized() == file.weights() == ["a.b.weight"]
    assert file.scheme("a.b.weight") is scheme
    assert torch.equal(file.restored("a.b.weight"), scheme.fake_quantize(w))
    assert list(findings(file.path)) == []


@pytest.mark.parametrize("suffix", SCALE_SUFFIXES)
@pytest.mark.parametrize("scheme", [FP8, SCHEMES["fp8_channel"]], ids=["fp8", "fp8_channel"])
@pytest.mark.parametrize("shape", [(16, 12), (8, 4, 3, 3), (1, 6)])
def test_a_scale_of_any_spelling_and_shape_is_found(suffix, scheme, shape, file_of):
    w = torch.randn(shape)
    tensors = scheme.nearest_tensors(w)
    for scale in (tensors["weight_scale"], tensors["weight_scale"].reshape(-1)):
        file = file_of(**{"a.weight": tensors["weight"], f"a.{suffix}": scale})
        assert torch.equal(file.restored("a.weight"), scheme.fake_quantize(w))


def test_weights_that_are_not_quantized_are_read_as_they_are(file_of):
    tensors = {"a.weight": torch.randn(4, 4).half(), "b.weight": torch.randn(4), "c.bias": torch.ones(4)}
    file = file_of(**tensors)
    assert (file.weights(), file.quantized()) == (["a.weight"], [])
    assert file.scheme("a.weight") is None
    assert torch.equal(file.restored("a.weight"), tensors["a.weight"].float())


@pytest.mark.parametrize("said", [None, "float8_e5m2"])
def test_codes_of_others_are_quantized_weights_of_no_known_scheme(said, file_of):
    codes = torch.randn(4, 4).to(torch.float8_e5m2)
    beside = {} if said is None else {"a.comfy_quant": marker(json.dumps({"format": said}))}
    file = file_of(**{"a.weight": codes, **beside})
    assert file.quantized() == ["a.weight"]
    assert file.scheme("a.weight") is None
    assert torch.equal(file.restored("a.weight"), codes.float())


def test_what_another_marker_says_is_believed(file_of):
    """The same codes with scales of blocks: restored by none of our schemes."""
    tensors = FP8.nearest_tensors(torch.randn(4, 4))
    file = file_of(
        **{f"a.{key}": tensor for key, tensor in tensors.items()}, **{"a.comfy_quant": marker('{"format": "mxfp8"}')}
    )
    assert file.scheme("a.weight") is None


def test_codes_of_an_unknown_format_are_not_taken_for_weights(file_of):
    tensors = SCHEMES["fp8"].nearest_tensors(torch.randn(8, 4))
    file = file_of(
        **{f"a.{key}": tensor for key, tensor in tensors.items()}, **{"a.comfy_quant": marker('{"format": "mxfp8"}')}
    )
    with pytest.raises(
        FileError, match=r"tensor a\.weight: got torch\.float8_e4m3fn in format 'mxfp8', expected float8"
    ):
        file.restored("a.weight")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"full_precision_matrix_mult": true}'])
def test_a_damaged_marker_is_named(text, file_of):
    tensors = FP8.nearest_tensors(torch.randn(4, 4))
    file = file_of(**{f"a.{key}": tensor for key, tensor in tensors.items()}, **{"a.comfy_quant": marker(text)})
    with pytest.raises(FileError, match=r"File made\.safetensors, tensor a\.comfy_quant: got unreadable"):
        file.restored("a.weight")


def test_a_scale_of_another_length_is_named(file_of):
    file = file_of(**{"a.weight": torch.ones(4, 4).to(torch.float8_e4m3fn), "a.weight_scale": torch.ones(3)})
    with pytest.raises(FileError, match=r"tensor a\.weight_scale: got shape \(3,\), expected 1 or 4 values"):
        file.restored("a.weight")


def test_differences_are_those_of_the_restored_weights(file_of, tmp_path):
    w = torch.randn(16, 12)
    tensors = SCHEMES["fp8_channel"].nearest_tensors(w)
    save_file({"a.weight": SCHEMES["fp8_channel"].restored(tensors)}, tmp_path / "same.safetensors")
    made = file_of(**{"a.weight": tensors["weight"], "a.scale": tensors["weight_scale"].reshape(-1)})
    (difference,) = compare(QuantizedFile(tmp_path / "same.safetensors"), made)
    assert (difference.key, difference.sqnr_db) == ("a.weight", float("inf"))
    assert difference.dtypes == (torch.float32, torch.float8_e4m3fn)
