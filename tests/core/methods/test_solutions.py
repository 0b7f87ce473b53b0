from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hswq.hswq_core.errors import FileError
from hswq.hswq_core.methods.solutions import Solutions, key_of, passing_solutions
from hswq.hswq_core.methods.solve import Solution
from hswq.hswq_core.quant.grid import FLOAT8_E4M3FN
from rig import pack


def solution(mark: float = 1.0, *, bias: bool = True) -> Solution:
    codes = torch.full((3, 2), mark).to(FLOAT8_E4M3FN.dtype)
    scale = torch.full((3, 1), 0.1 * mark)
    tensors = {"weight": codes, "weight_scale": scale}
    return Solution("fp8_channel", tensors, "compensated", torch.ones(3) if bias else None, 0.25, 0.5, 0.01, 7)


def same(a: Solution, b: Solution) -> bool:
    biases = (a.bias is None and b.bias is None) or torch.equal(a.bias, b.bias)
    recorded = ("scheme", "how", "error", "nearest_error", "damping", "dead")
    numbers = all(getattr(a, name) == getattr(b, name) for name in recorded)
    codes = torch.equal(a.codes.float(), b.codes.float()) and a.codes.dtype == b.codes.dtype
    return biases and numbers and codes and set(a.tensors) == set(b.tensors) and torch.equal(a.scale, b.scale)


def test_what_was_added_is_there_after_a_restart(tmp_path):
    done = Solutions.resumed(tmp_path / "s.work", "key")
    assert len(done) == 0
    done.add("a.0/odd name", solution(1.0))
    done.add("b", solution(2.0, bias=False))
    done.save_numbers("probe", {"b": 0.5})
    again = Solutions.resumed(tmp_path / "s.work", "key")
    assert set(again) == {"a.0/odd name", "b"}
    assert same(again["a.0/odd name"], solution(1.0))
    assert same(again["b"], solution(2.0, bias=False))
    assert again.error("b") == 0.25
    done.add("unscaled", replace(solution(), scheme="fp8_cast", tensors={"weight": solution().codes}))
    unscaled = Solutions.resumed(tmp_path / "s.work", "key")["unscaled"]
    assert unscaled.scale is None
    assert (unscaled.scheme, set(unscaled.tensors)) == ("fp8_cast", {"weight"})
    assert torch.equal(unscaled.restored(torch.device("cpu")), solution().codes.float())
    assert again.numbers("probe") == {"b": 0.5}
    assert again.numbers("other") == {}


def test_work_on_something_else_is_dropped(tmp_path):
    folder = tmp_path / "s.work"
    Solutions.resumed(folder, "old").add("a", solution())
    new = Solutions.resumed(folder, "new")
    assert "a" not in new
    assert not (folder / "old").exists()


def test_a_file_cut_short_by_a_crash_is_done_again(tmp_path):
    done = Solutions.resumed(tmp_path / "s.work", "key")
    done.add("a", solution())
    done.add("b", solution())
    (first, _) = sorted(done.folder.glob("*.safetensors"))
    first.write_bytes(first.read_bytes()[:20])
    done.save_numbers("probe", {"a": 1.0})
    (done.folder / "probe.json").write_text('{"a": 1.', encoding="utf-8")
    again = Solutions.resumed(tmp_path / "s.work", "key")
    assert len(again) == 1
    assert not first.exists()
    assert again.numbers("probe") == {}


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "s.work").mkdir()
    (tmp_path / "s.work" / "key").write_text("a file in the way")
    with pytest.raises(FileError, match="expected to be able to write"):
        Solutions.resumed(tmp_path / "s.work", "key").add("a", solution())


def test_keys_tell_their_parts_apart():
    assert key_of("a", "b") == key_of("a", "b")
    assert len({key_of("a", "b"), key_of("ab"), key_of("b", "a"), key_of("a", "b", "")}) == 4


KILLED = """
import os, signal, sys
sys.path.insert(0, {bench!r})
from rig import pack
pack.alias()
from pathlib import Path
from hswq.hswq_core.methods.solutions import passing_solutions
with passing_solutions(Path({folder!r})) as solutions:
    solutions.save_numbers("stage", {{"a": 1.0}})
    print(solutions.folder, flush=True)
    {then}
"""


def start(folder: Path, then: str) -> subprocess.Popen[str]:
    code = KILLED.format(bench=str(pack.ROOT / "bench"), folder=str(folder), then=then)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True)


@pytest.mark.parametrize("failure", [None, KeyboardInterrupt])
def test_passing_solutions_leave_nothing(tmp_path, failure):
    def use() -> None:
        with passing_solutions(tmp_path) as solutions:
            solutions.add("a", solution())
            assert torch.equal(solutions["a"].codes.view(torch.uint8), solution().codes.view(torch.uint8))
            if failure is not None:
                raise failure

    with suppress(KeyboardInterrupt):
        use()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="Windows has no flock")
def test_what_a_killed_process_left_goes_with_the_next_and_what_another_uses_stays(tmp_path):
    killed = start(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)")
    left = Path(killed.communicate()[0].strip())
    other = start(tmp_path, "sys.stdin.readline()")
    theirs = Path(other.stdout.readline().strip())
    assert not left.exists()
    with passing_solutions(tmp_path):
        assert theirs.exists()
    other.communicate("go on\n")
    assert other.returncode == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="Windows has no flock")
def test_a_folder_of_a_process_killed_before_it_had_its_lock_goes_too(tmp_path):
    (tmp_path / ".hswq-abandoned").mkdir()
    with passing_solutions(tmp_path):
        assert not (tmp_path / ".hswq-abandoned").exists()
    assert list(tmp_path.iterdir()) == []
