from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hswq.hswq_core import FLOAT8_E4M3FN, FileError
from hswq.hswq_core.solve import Solution
from hswq.hswq_core.workspace import Workspace, key_of


def solution(mark: float = 1.0, *, bias: bool = True) -> Solution:
    codes = torch.full((3, 2), mark).to(FLOAT8_E4M3FN.dtype)
    scale = torch.full((3, 1), 0.1 * mark)
    return Solution(codes, scale, "compensated", torch.ones(3) if bias else None, 0.25, 0.5, 0.01, 7)


def same(a: Solution, b: Solution) -> bool:
    biases = (a.bias is None and b.bias is None) or torch.equal(a.bias, b.bias)
    numbers = all(getattr(a, name) == getattr(b, name) for name in ("how", "error", "nearest_error", "damping", "dead"))
    codes = torch.equal(a.codes.float(), b.codes.float()) and a.codes.dtype == b.codes.dtype
    return biases and numbers and codes and torch.equal(a.scale, b.scale)


def test_what_was_added_is_there_after_a_restart(tmp_path):
    done = Workspace(tmp_path / "s.work", "key")
    assert len(done) == 0
    done.add("a.0/odd name", solution(1.0))
    done.add("b", solution(2.0, bias=False))
    done.save_numbers("probe", {"b": 0.5})
    again = Workspace(tmp_path / "s.work", "key")
    assert set(again) == {"a.0/odd name", "b"}
    assert same(again["a.0/odd name"], solution(1.0))
    assert same(again["b"], solution(2.0, bias=False))
    assert again.error("b") == 0.25
    done.add("unscaled", replace(solution(), scale=None))
    assert Workspace(tmp_path / "s.work", "key")["unscaled"].scale is None
    assert again.numbers("probe") == {"b": 0.5}
    assert again.numbers("other") == {}


def test_work_on_something_else_is_dropped(tmp_path):
    folder = tmp_path / "s.work"
    Workspace(folder, "old").add("a", solution())
    new = Workspace(folder, "new")
    assert "a" not in new
    assert not (folder / "old").exists()


def test_a_file_cut_short_by_a_crash_is_done_again(tmp_path):
    done = Workspace(tmp_path / "s.work", "key")
    done.add("a", solution())
    done.add("b", solution())
    (first, _) = sorted(done.folder.glob("*.safetensors"))
    first.write_bytes(first.read_bytes()[:20])
    done.save_numbers("probe", {"a": 1.0})
    (done.folder / "probe.json").write_text('{"a": 1.', encoding="utf-8")
    again = Workspace(tmp_path / "s.work", "key")
    assert len(again) == 1
    assert not first.exists()
    assert again.numbers("probe") == {}


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "s.work").mkdir()
    (tmp_path / "s.work" / "key").write_text("a file in the way")
    with pytest.raises(FileError, match="expected to be able to write"):
        Workspace(tmp_path / "s.work", "key").add("a", solution())


def test_keys_tell_their_parts_apart():
    assert key_of("a", "b") == key_of("a", "b")
    assert len({key_of("a", "b"), key_of("ab"), key_of("b", "a"), key_of("a", "b", "")}) == 4
