from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from hswq.hswq_core.errors import FileError
from hswq.hswq_core.files.checkpoint import FileSource, TensorInfo, source_hash
from safetensors.torch import save_file


def raw(tensor: torch.Tensor) -> list[int]:
    return tensor.reshape(-1).view(torch.uint8).tolist()


# Reading


def test_a_file_of_the_library_reads_as_it_lies_on_disk(tmp_path):
    tensors = {
        "z.weight": torch.randn(3, 5).half(),
        "a.scale": torch.tensor(0.5),
        "m.codes": torch.randn(7).to(torch.float8_e4m3fn),
        "steps": torch.tensor([1, 2, 2**40]),
    }
    save_file(tensors, tmp_path / "model.v1.safetensors", {"format": "pt"})
    source = FileSource(tmp_path / "model.v1.safetensors")
    assert source.name == "model.v1"
    assert source.metadata == {"format": "pt"}
    assert set(source.entries) == set(tensors)
    for key, tensor in tensors.items():
        assert source.entries[key] == TensorInfo(tensor.dtype, tuple(tensor.shape))
        assert raw(source.read(key)) == raw(tensor)


def with_header(path: Path, header: object, data: bytes) -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def record(dtype: str, shape: list[int], start: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def test_entries_come_in_the_order_of_the_data_not_of_the_header(tmp_path):
    header = {"b": record("U8", [2], 1, 3), "a": record("U8", [1], 0, 1)}
    source = FileSource(with_header(tmp_path / "f.safetensors", header, b"\1\2\3"))
    assert list(source.entries) == ["a", "b"]
    assert source.read("b").tolist() == [2, 3]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x01",
        b"\xff" * 64,
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 5) + b"{bad}",
        struct.pack("<Q", 2**40) + b"{}",
        struct.pack("<Q", 2) + b"{}" + b"extra data",
        b"PK\x03\x04 a .ckpt is a zip archive",
    ],
)
def test_a_file_that_is_no_safetensors_file_is_an_error_that_names_it(content, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(FileError, match=r"model\.safetensors"):
        FileSource(path)


def test_a_truncated_file_is_an_error_that_names_it(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"x": torch.ones(100)}, path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FileError, match=r"model\.safetensors"):
        FileSource(path)


def test_a_missing_file_is_an_error_that_names_it(tmp_path):
    with pytest.raises(FileError, match=r"model\.safetensors"):
        FileSource(tmp_path / "model.safetensors")


def test_a_dtype_outside_the_table_is_an_error_that_names_the_tensor(tmp_path):
    path = with_header(tmp_path / "model.safetensors", {"x": record("F8_E8M0", [2], 0, 2)}, b"\0\0")
    with pytest.raises(FileError, match=r"model\.safetensors, tensor x.*F8_E8M0"):
        FileSource(path)


def test_bytes_that_do_not_fill_the_shape_are_an_error_that_names_the_tensor(tmp_path):
    path = with_header(tmp_path / "model.safetensors", {"x": record("F16", [3], 0, 4)}, b"\0" * 4)
    with pytest.raises(FileError, match=r"model\.safetensors.*tensor x of shape \(3,\) and dtype F16 in 4 bytes"):
        FileSource(path)


def test_bytes_of_a_tensor():
    assert TensorInfo(torch.bfloat16, (3, 5)).nbytes == 30
    assert TensorInfo(torch.float32, ()).nbytes == 4
    assert TensorInfo(torch.float32, (0, 7)).nbytes == 0


# The source's hash


def test_the_hash_sees_keys_order_shapes_dtypes_and_metadata_but_no_data(source_of):
    def digest(tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> str:
        return source_hash(source_of(tensors, metadata))

    a, b = torch.zeros(2, 3), torch.zeros(4)
    base = digest({"a": a, "b": b}, {"k": "v", "l": "w"})
    assert digest({"a": a + 1, "b": b}, {"l": "w", "k": "v"}) == base
    others = [
        digest({"a": a, "c": b}, {"k": "v", "l": "w"}),
        digest({"b": b, "a": a}, {"k": "v", "l": "w"}),
        digest({"a": a.reshape(3, 2), "b": b}, {"k": "v", "l": "w"}),
        digest({"a": a.half(), "b": b}, {"k": "v", "l": "w"}),
        digest({"a": a, "b": b}, {"k": "v", "l": "x"}),
        digest({"a": a, "b": b}),
    ]
    assert len({base, *others}) == 7
