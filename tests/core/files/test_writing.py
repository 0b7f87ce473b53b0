from __future__ import annotations

import struct
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from hswq.hswq_core.errors import FileError
from hswq.hswq_core.files import atomic, tensor_header, writing
from hswq.hswq_core.files.checkpoint import FileSource, TensorInfo, read_header
from hswq.hswq_core.files.tensor_header import DTYPE_NAMES, NAMED_DTYPES
from hswq.hswq_core.files.writing import MAX_HEADER_BYTES, OutputTensor, _behind, build_header, write_checkpoint
from hswq.hswq_core.progress import Step, no_progress
from safetensors.torch import load_file, save_file


def output(key: str, tensor: torch.Tensor) -> OutputTensor:
    return OutputTensor(key, TensorInfo(tensor.dtype, tuple(tensor.shape)), lambda: tensor)


def write(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> int:
    outputs = [output(key, tensor) for key, tensor in tensors.items()]
    return write_checkpoint(path, outputs, metadata or {}, progress=no_progress)


def raw(tensor: torch.Tensor) -> list[int]:
    return tensor.reshape(-1).view(torch.uint8).tolist() if tensor.numel() else []


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Order, dtypes and shapes a real checkpoint may have: odd sizes, empty tensors, scalars.
MIXED = {
    "z.weight": torch.randn(3, 5).half(),
    "a.scale": torch.tensor(0.5),
    "m.codes": torch.randn(7).to(torch.float8_e4m3fn),
    "empty": torch.empty(0, 4, dtype=torch.bfloat16),
    "b": torch.randn(2, 3, 4).bfloat16(),
    "also empty": torch.empty(0),
    "steps": torch.tensor([1, 2, 2**40]),
    "flag": torch.tensor([True, False, True]),
}


# The file


def test_header_bytes():
    tensors = [output("x", torch.zeros(2, dtype=torch.float16)), output("y.é", torch.zeros(1, 3, dtype=torch.uint8))]
    text = (
        '{"__metadata__":{"a":"b"},'
        '"x":{"dtype":"F16","shape":[2],"data_offsets":[0,4]},'
        '"y.é":{"dtype":"U8","shape":[1,3],"data_offsets":[4,7]}}'
    ).encode()
    padded = text + b" " * (-len(text) % 8)
    assert len(padded) == 136
    assert build_header(tensors, {"a": "b"}) == b"\x88\0\0\0\0\0\0\0" + padded


def test_file_bytes(tmp_path):
    size = write(tmp_path / "f", {"x": torch.tensor([1.0, -2.0], dtype=torch.float16), "y": torch.tensor([7]).byte()})
    text = b'{"x":{"dtype":"F16","shape":[2],"data_offsets":[0,4]},"y":{"dtype":"U8","shape":[1],"data_offsets":[4,5]}}'
    expected = struct.pack("<Q", 112) + text.ljust(112) + b"\x00\x3c\x00\xc0" + b"\x07"
    assert (tmp_path / "f").read_bytes() == expected
    assert size == len(expected)


@pytest.mark.parametrize("key", ["x" * n for n in range(1, 10)])
def test_the_data_start_at_a_multiple_of_8_bytes(key):
    assert len(build_header([output(key, torch.zeros(1))], {})) % 8 == 0


def test_the_safetensors_library_reads_every_bit(tmp_path):
    write(tmp_path / "f.safetensors", MIXED, {"format": "pt"})
    loaded = load_file(tmp_path / "f.safetensors")
    assert set(loaded) == set(MIXED)
    for key, tensor in MIXED.items():
        assert loaded[key].dtype == tensor.dtype
        assert loaded[key].shape == tensor.shape
        assert raw(loaded[key]) == raw(tensor)


def test_order_and_metadata_survive(tmp_path):
    metadata = {"z": "1", "a": '{"nested":"é"}', "": ""}
    write(tmp_path / "f.safetensors", MIXED, metadata)
    source = FileSource(tmp_path / "f.safetensors")
    assert list(source.entries) == list(MIXED)
    assert source.metadata == metadata


@pytest.mark.parametrize("dtype", DTYPE_NAMES, ids=str)
def test_every_dtype_of_the_table_is_the_librarys(dtype, tmp_path):
    bits = torch.arange(16, dtype=torch.uint8) % 2
    tensor = bits.bool() if dtype == torch.bool else bits.view(dtype)
    save_file({"x": tensor}, tmp_path / "theirs.safetensors")
    write(tmp_path / "ours.safetensors", {"x": tensor})
    for name in ("theirs", "ours"):
        source = FileSource(tmp_path / f"{name}.safetensors")
        assert source.entries["x"] == TensorInfo(dtype, tuple(tensor.shape))
        assert raw(source.read("x")) == raw(tensor)
    assert raw(load_file(tmp_path / "ours.safetensors")["x"]) == raw(tensor)


def test_the_dtype_table_is_one_to_one():
    assert {NAMED_DTYPES[name]: name for name in DTYPE_NAMES.values()} == DTYPE_NAMES


def test_a_tensor_that_is_not_contiguous_is_written_as_it_reads(tmp_path):
    tensor = torch.arange(6.0).reshape(2, 3).T
    write(tmp_path / "f.safetensors", {"x": tensor})
    assert torch.equal(load_file(tmp_path / "f.safetensors")["x"], tensor)


def test_a_parameter_that_requires_grad_is_written(tmp_path):
    write(tmp_path / "f.safetensors", {"x": torch.nn.Parameter(torch.ones(3))})
    assert load_file(tmp_path / "f.safetensors")["x"].tolist() == [1.0, 1.0, 1.0]


def test_a_file_of_nothing(tmp_path):
    write(tmp_path / "f.safetensors", {}, {"a": "b"})
    assert read_header(tmp_path / "f.safetensors") == ({"a": "b"}, {})


def test_a_key_twice_is_refused():
    with pytest.raises(FileError, match="x twice"):
        build_header([output("x", torch.zeros(1)), output("x", torch.zeros(1))], {})


@pytest.mark.parametrize("metadata", [{}, {"a": "b"}])
def test_a_tensor_named_like_the_metadata_is_refused(metadata):
    with pytest.raises(FileError):
        build_header([output("__metadata__", torch.zeros(1))], metadata)


def test_a_header_larger_than_this_pack_reads_is_refused(monkeypatch):
    assert MAX_HEADER_BYTES == tensor_header.MAX_HEADER_BYTES == 2**24
    assert MAX_HEADER_BYTES <= 100_000_000  # the limit of the safetensors library
    monkeypatch.setattr(writing, "MAX_HEADER_BYTES", 1000)
    build_header([], {"a": "x" * 900})
    with pytest.raises(FileError, match="header"):
        build_header([], {"a": "x" * 1000})


def test_the_largest_header_that_is_written_is_read_again(tmp_path):
    beside = len(build_header([], {"a": "x" * 1000})) - 8 - 1000
    largest = {"a": "x" * (MAX_HEADER_BYTES - beside)}
    write_checkpoint(tmp_path / "f", [], largest, progress=no_progress)
    assert dict(FileSource(tmp_path / "f").metadata) == largest
    with pytest.raises(FileError, match=rf"header.*at most {MAX_HEADER_BYTES:,}, which is what this pack reads"):
        write_checkpoint(tmp_path / "g", [], {"a": largest["a"] + "x" * 8}, progress=no_progress)
    assert names(tmp_path) == ["f"]


# Writing


def test_tensors_are_produced_one_at_a_time_when_their_turn_comes(tmp_path):
    events: list[str] = []

    def produce(key: str) -> torch.Tensor:
        events.append(f"produce {key}")
        return torch.ones(2)

    def progress(step: Step, done: int, total: int) -> None:
        events.append(f"{step} {done}/{total}")

    outputs = [OutputTensor(key, TensorInfo(torch.float32, (2,)), partial(produce, key)) for key in ("a", "b")]
    write_checkpoint(tmp_path / "f", outputs, {}, progress=progress)
    assert events == ["Writing a 0/16", "produce a", "Writing b 8/16", "produce b"]


class Slow:
    """A file on a slow disk: a write ends when it is allowed to."""

    def __init__(self) -> None:
        self.allowed = threading.Semaphore(0)
        self.written: list[bytes] = []

    def write(self, data: bytes) -> int:
        if data:
            assert self.allowed.acquire(timeout=60)
        self.written.append(bytes(data))
        return len(data)


def test_a_tensor_is_made_while_one_is_written_but_no_further():
    file = Slow()
    with _behind(file) as write:
        write(memoryview(b"first"))
        assert b"first" not in file.written  # and yet the second can be made
        threading.Timer(0.05, file.allowed.release).start()
        write(memoryview(b"second"))
        assert b"first" in file.written
        file.allowed.release()
    assert file.written[1:] == [b"first", b"second"]


def test_a_disk_that_fails_in_the_middle_is_a_file_error_and_nothing_is_left(tmp_path):
    resource = pytest.importorskip("resource", reason="no limits on Windows")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, before[1]))
    try:
        with pytest.raises(FileError, match=r"Folder.*File too large"):
            write(tmp_path / "f", {str(n): torch.ones(2**17) for n in range(8)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names(tmp_path) == []


def fail(_step: Step, done: int, _total: int) -> None:
    if done:
        raise KeyboardInterrupt


def refuse(path: Path) -> None:
    raise FileError(f"File {path.name}", got="x", expected="y", remedy="z")


@pytest.mark.parametrize("old", [None, b"old"])
@pytest.mark.parametrize(
    ("wrong", "progress", "check", "error"),
    [
        (torch.zeros(3), no_progress, None, FileError),
        (torch.zeros(2).half(), no_progress, None, FileError),
        (torch.zeros(1, 2), no_progress, None, FileError),
        (torch.zeros(2), fail, None, KeyboardInterrupt),
        (torch.zeros(2), no_progress, refuse, FileError),
    ],
    ids=["another size", "another dtype", "another shape", "cancelled", "refused by the check"],
)
def test_whatever_goes_wrong_nothing_is_left_and_an_old_file_stays(
    wrong: torch.Tensor,
    progress: Callable[[str, int, int], None],
    check: Callable[[Path], None] | None,
    error: type[BaseException],
    old: bytes | None,
    tmp_path: Path,
):
    path = tmp_path / "f.safetensors"
    if old:
        path.write_bytes(old)
    outputs = [output("good", torch.ones(2)), OutputTensor("bad", TensorInfo(torch.float32, (2,)), lambda: wrong)]
    with pytest.raises(error):
        write_checkpoint(path, outputs, {}, progress=progress, check=check)
    assert names(tmp_path) == (["f.safetensors"] if old else [])
    assert not old or path.read_bytes() == old


def test_a_wrong_tensor_is_named(tmp_path):
    bad = OutputTensor("x.weight", TensorInfo(torch.float32, (2,)), lambda: torch.zeros(3))
    with pytest.raises(FileError, match=r"x\.weight.*\(3,\).*\(2,\)"):
        write_checkpoint(tmp_path / "f", [bad], {}, progress=no_progress)


def test_the_check_sees_the_finished_file_before_it_has_its_name(tmp_path):
    path, seen = tmp_path / "f.safetensors", []

    def check(temporary: Path) -> None:
        seen.append((load_file(temporary)["x"].tolist(), path.exists()))

    write_checkpoint(path, [output("x", torch.ones(2))], {}, progress=no_progress, check=check)
    assert seen == [([1.0, 1.0], False)]
    assert path.exists()


def unreadable(*_: object) -> torch.Tensor:
    raise OSError(5, "Input/output error")


def test_a_reading_error_is_not_taken_for_a_full_disk(tmp_path):
    """Telling the user to free some space would send them the wrong way."""
    good, bad = output("x", torch.ones(2)), OutputTensor("y", TensorInfo(torch.float32, (2,)), unreadable)
    with pytest.raises(FileError, match=r"tensor y.*Input/output error.*able to read"):
        write_checkpoint(tmp_path / "f", [good, bad], {}, progress=no_progress)
    with pytest.raises(FileError, match=r"File f.*Input/output error.*able to read"):
        write_checkpoint(tmp_path / "f", [good], {}, progress=no_progress, check=unreadable)
    assert names(tmp_path) == []


def test_a_full_disk_is_a_file_error_that_names_the_folder(tmp_path, monkeypatch):
    def full(_handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(FileError, match=r"Folder.*No space left on device.*Free some space"):
        write(tmp_path / "f", {"x": torch.ones(2)})
    assert names(tmp_path) == []
