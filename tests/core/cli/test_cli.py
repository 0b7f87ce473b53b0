"""The command line as its users have it: another process for the entry, the same function for the rest."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hswq.hswq_core.calibration.observer import LayerStats
from hswq.hswq_core.calibration.session import Session, load_session, save_session
from hswq.hswq_core.calibration.states import Sample, State
from hswq.hswq_core.calibration.states_file import load_states, save_states, states_path
from hswq.hswq_core.cli.main import main
from hswq.hswq_core.files.checkpoint import FileSource
from hswq.hswq_core.model.fingerprint import Fingerprint, layout_hash, sample_weights
from hswq.hswq_core.quant.grid import FLOAT8_E4M3FN
from hswq.hswq_core.quant.metrics import sqnr_db
from rig.pack import ROOT
from safetensors.torch import load_file, save_file

PREFIX = "model.diffusion_model."
SHAPES = {
    "input_blocks.0.0": (8, 4, 3, 3),
    "label_emb.0.0": (256, 128),
    "middle_block.0.conv": (64, 64, 3, 3),
    "middle_block.1.to_q": (192, 192),
    "out.2": (4, 8, 3, 3),
}
LARGE = ("label_emb.0.0", "middle_block.0.conv", "middle_block.1.to_q")


@pytest.fixture
def model(tmp_path) -> Path:
    """An SDXL-like checkpoint with a text encoder's embedding beside it."""
    state = {f"{PREFIX}{name}.weight": (torch.randn(shape) * 0.02).half() for name, shape in SHAPES.items()}
    state |= {f"{PREFIX}{name}.bias": torch.randn(shape[0]).half() for name, shape in SHAPES.items()}
    state["conditioner.embedding.weight"] = torch.randn(300, 64).half()
    save_file(state, tmp_path / "model.safetensors", metadata={"made_by": "test"})
    return tmp_path / "model.safetensors"


def session_of(model: Path, path: Path, calls: int = 3) -> Path:
    state = {key.removeprefix(PREFIX): tensor for key, tensor in load_file(model).items()}
    layers = {}
    for number, (name, shape) in enumerate(SHAPES.items()):
        kind = "Linear" if len(shape) == 2 else "Conv2d"
        ramp = torch.linspace(0.5, 1.5, shape[1], dtype=torch.float64) * calls
        layers[name] = LayerStats(kind, shape, calls, calls, 0.0, float(calls * (number + 1)), ramp, ramp * 0.1, 2.0)
    layout = layout_hash({name: (stats.kind, stats.shape) for name, stats in layers.items()})
    fingerprint = Fingerprint(layout, sample_weights(SHAPES, lambda name: state[f"{name}.weight"]))
    save_session(Session("SDXL", fingerprint, layers, calls, images=1, steps={20: 1}), path)
    return path


@pytest.fixture
def session(model, tmp_path) -> Path:
    return session_of(model, tmp_path / "stats.pt")


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def test_the_module_runs_from_the_repository_and_needs_no_comfyui(model, session):
    command = [sys.executable, "-m", "hswq_core", "convert", str(model), "--session", str(session)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "quantized" in done.stderr
    assert done.stdout == ""
    usage = subprocess.run([*command[:3], "convert"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert usage.returncode == 2
    assert "usage: python -m hswq_core convert" in usage.stderr


@pytest.mark.parametrize("name", ["v1", "v2", "comfy"])
def test_convert_file_to_file(model, session, name):
    assert run("-q", "convert", model, "--session", session, "--format", name, "--keep-ratio", "0.34") == 0
    made = model.with_name(f"model_hswq_r3_0.34_{name}.safetensors")
    file, source = FileSource(made), FileSource(model)
    assert file.metadata["made_by"] == "test"
    header = json.loads(file.metadata["hswq"])
    assert header["counts"] == {"quantize": 2, "keep": 1, "skip": 2}
    assert header["session"]["calls"] == 3
    # to_q has the largest sensitivity of the three that are eligible
    for layer in LARGE:
        expected = torch.float16 if layer == "middle_block.1.to_q" else torch.float8_e4m3fn
        assert file.entries[f"{PREFIX}{layer}.weight"].dtype == expected
    others = [key for key in source.entries if key.removeprefix(PREFIX).removesuffix(".weight") not in LARGE]
    assert all(torch.equal(file.read(key), source.read(key)) for key in others)
    keys = [key for key in file.entries if key in source.entries]
    assert keys == list(source.entries)


def test_convert_without_a_session_rounds_to_nearest(model):
    assert run("-q", "convert", model, "--method", "nearest", "--format", "v2") == 0
    file = FileSource(model.with_name("model_nearest_v2.safetensors"))
    w = FileSource(model).read(f"{PREFIX}label_emb.0.0.weight").float()
    scale = file.read(f"{PREFIX}label_emb.0.0.scale")
    assert scale.item() == pytest.approx(w.abs().max().item() / 448, rel=1e-6)
    restored = FLOAT8_E4M3FN.dequantize(file.read(f"{PREFIX}label_emb.0.0.weight"), scale)
    assert (restored - w).abs().max() <= w.abs().max() / 28  # half a step of the widest binade: 16 of 448
    assert json.loads(file.metadata["hswq"])["session"] is None


def test_the_output_folder_and_a_dry_run(model, session, tmp_path, capsys):
    folder = tmp_path / "new" / "files"
    assert run("convert", model, "--session", session, "-o", folder, "--dry-run") == 0
    assert not folder.exists()
    assert "would be written to" in capsys.readouterr().err
    assert run("-q", "convert", model, "--session", session, "-o", folder) == 0
    assert [file.name for file in folder.glob("*.safetensors")] == ["model_hswq_r3_0.25_v2.safetensors"]
    assert run("-q", "convert", model, "--session", session, "-o", folder) == 0  # never over an existing file
    assert len(list(folder.glob("*.safetensors"))) == 2
    assert not list(folder.glob("*.tmp"))


def test_one_bad_file_does_not_stop_the_others_but_the_exit_code_says_so(model, tmp_path, capsys):
    (tmp_path / "a_bad.safetensors").write_bytes(b"no safetensors")
    assert run("-q", "convert", tmp_path / "*.safetensors", "--method", "nearest") == 1
    said = capsys.readouterr().err
    assert "File a_bad.safetensors" in said
    assert "Not converted: a_bad.safetensors" in said
    assert model.with_name("model_nearest_v2.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["convert", "MODEL"], "session: got none"),
        (["convert", "MODEL", "--session", "missing.pt"], "Session file missing.pt: got no such file"),
        (["convert", "MODEL", "--session", "STATS", "--keep-ratio", "1.5"], "keep_ratio: got 1.5"),
        (["convert", "missing.safetensors", "--method", "nearest"], "File missing.safetensors"),
        (["inspect", "missing.pt"], "got no such file"),
        (["merge", "STATS", "-o", "new.pt"], "two or more sessions"),
        (["merge", "STATS", "STATS", "-o", "STATS"], "which exists"),
        (["compare", "MODEL", "missing.safetensors"], "File missing.safetensors"),
    ],
)
def test_what_is_wrong_is_said_with_exit_code_1(model, session, capsys, arguments, words):
    places = {"MODEL": model, "STATS": session}
    before = set(model.parent.iterdir())
    assert run("-q", *(places.get(word, word) for word in arguments)) == 1
    assert words in capsys.readouterr().err
    assert set(model.parent.iterdir()) == before


def test_a_session_of_other_weights_is_refused(model, session, tmp_path, capsys):
    state = load_file(model)
    save_file({key: tensor * 1.1 for key, tensor in state.items()}, tmp_path / "other.safetensors")
    assert run("-q", "convert", tmp_path / "other.safetensors", "--session", session) == 1
    assert "same architecture with other weights" in capsys.readouterr().err


def test_an_unknown_model_needs_a_session(tmp_path, capsys):
    save_file({"embed.weight": torch.randn(300, 64)}, tmp_path / "odd.safetensors")
    assert run("-q", "convert", tmp_path / "odd.safetensors", "--method", "nearest") == 1
    assert "no known family" in capsys.readouterr().err


def test_a_pattern_without_files_is_a_usage_error(tmp_path):
    with pytest.raises(SystemExit, match="2"):
        run("verify", tmp_path / "*.safetensors")


def test_merged_sessions_are_what_one_machine_would_have_recorded(model, tmp_path):
    parts = [session_of(model, tmp_path / f"part{calls}.pt", calls) for calls in (2, 3)]
    fingerprint = load_session(parts[0]).fingerprint
    for number, path in enumerate(parts):
        sample = Sample(4)
        sample.merge(_sample([0.1 * number + 0.2 * i for i in range(4)]))
        save_states(sample, fingerprint, states_path(path))
    assert run("-q", "merge", *parts, "-o", tmp_path / "whole.pt") == 0
    whole, one = load_session(tmp_path / "whole.pt"), load_session(session_of(model, tmp_path / "one.pt", 5))
    assert (whole.calls, whole.images, whole.steps) == (5, 2, {20: 2})
    for name, stats in one.layers.items():
        merged = whole.layers[name]
        assert merged.sensitivity == pytest.approx(stats.sensitivity, rel=1e-12)
        assert torch.allclose(merged.importance, stats.importance, rtol=1e-12)
    kept = load_states(states_path(tmp_path / "whole.pt"), fingerprint, 100).states
    assert [round(state.key, 1) for state in kept] == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]


def _sample(keys: list[float]) -> Sample:
    sample = Sample(len(keys))
    for key in keys:
        sample.add([State(key, {"x": torch.full((1, 4), key), "sigma": torch.ones(1)}, {})])
    return sample


def test_inspect(model, session, capsys):
    assert run("-q", "inspect", session) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in SHAPES)
    assert "SDXL, 5 layers, 3 calls, 1 images" in shown
    assert run("-q", "convert", model, "--session", session) == 0
    assert run("-q", "inspect", model.with_name("model_hswq_r3_0.25_v2.safetensors"), "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in record["rows"]] == list(SHAPES)
    assert {row["action"] for row in record["rows"]} <= {"quantize", "keep", "skip"}
    assert run("-q", "inspect", model) == 0
    assert "conditioner.embedding.weight" in capsys.readouterr().out


def test_compare_gives_the_sqnr_of_each_weight(model, capsys):
    assert run("-q", "convert", model, "--method", "nearest", "--format", "v2") == 0
    made = model.with_name("model_nearest_v2.safetensors")
    assert run("-q", "compare", model, made, "--json") == 0
    rows = {row["weight"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert set(rows) == {key for key in FileSource(model).entries if key.endswith(".weight")}
    file, source = FileSource(made), FileSource(model)
    for layer in LARGE:
        key = f"{PREFIX}{layer}.weight"
        restored = FLOAT8_E4M3FN.dequantize(file.read(key), file.read(f"{PREFIX}{layer}.scale"))
        assert rows[key]["SQNR, dB"] == pytest.approx(sqnr_db(source.read(key).float(), restored), abs=1e-6)
    assert rows["conditioner.embedding.weight"]["SQNR, dB"] is None  # equal
    assert run("-q", "compare", model, made) == 0
    table = capsys.readouterr().out.splitlines()
    assert "5 weights" not in table[-1]
    assert table[-1].startswith("6 weights, 3 equal, mean SQNR of those that changed 31")


def test_compare_tells_another_shape_from_equal(model, tmp_path, capsys):
    state = load_file(model)
    key = f"{PREFIX}label_emb.0.0.weight"
    save_file(state | {key: state[key][:8].contiguous()}, tmp_path / "cut.safetensors")
    assert run("-q", "compare", model, tmp_path / "cut.safetensors") == 1
    table = capsys.readouterr().out.splitlines()
    assert table[1].split(maxsplit=3) == [key, "float16", "float16", "another shape"]
    assert table[-1] == "6 weights, 5 equal, 1 of another shape"


class TestVerify:
    @pytest.fixture
    def made(self, model) -> Path:
        assert run("-q", "convert", model, "--method", "nearest", "--format", "v2") == 0
        return model.with_name("model_nearest_v2.safetensors")

    def changed(self, made: Path, **tensors: torch.Tensor | None) -> Path:
        file, path = FileSource(made), made.with_name("changed.safetensors")
        state = load_file(made)
        for name, tensor in tensors.items():
            key = f"{PREFIX}label_emb.0.0.{name}"
            state.pop(key, None)
            if tensor is not None:
                state[key] = tensor
        save_file(state, path, metadata=dict(file.metadata))
        return path

    def test_a_sound_file(self, model, made):
        assert run("-q", "verify", made, model) == 0

    @pytest.mark.parametrize(
        ("tensors", "words"),
        [
            ({"scale": torch.tensor([float("nan")])}, "scale: NaN, infinity, zero"),
            ({"scale": torch.tensor([0.0])}, "scale: NaN, infinity, zero"),
            ({"scale": torch.ones(3)}, "expected 1 or 256 values"),
            ({"scale": None}, "no scale, which format v2 has"),
            ({"weight": torch.full((256, 128), 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)}, "NaN codes"),
            ({"weight": torch.ones(256, 128).half(), "scale": None}, "2 FP8 weights, the header says 3"),
        ],
    )
    def test_what_is_wrong_is_named(self, made, capsys, tensors, words):
        assert run("-q", "verify", made, self.changed(made, **tensors)) == 1
        assert words in capsys.readouterr().err

    def test_a_truncated_file_and_a_newer_one(self, made, capsys):
        whole = made.read_bytes()
        half, newer = made.with_name("half.safetensors"), made.with_name("newer.safetensors")
        half.write_bytes(whole[:-1])
        save_file(load_file(made), newer, metadata={"hswq": '{"version": 9, "format": "v2"}'})
        assert run("-q", "verify", half, newer) == 1
        said = capsys.readouterr().err
        assert "half.safetensors" in said
        assert "version 9, expected version 1" in said
