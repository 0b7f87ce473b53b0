"""User errors: each gives a message that names its subject, and nothing is written."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from fuzzing.file_attacks import CHECKPOINTS, STATES
from fuzzing.session_attacks import SESSIONS
from hswq.hswq_core.calibration.session import load_session, save_session
from rig import flow, graph, prompts, tiny
from rig.client import Prompt
from rig.wait import until

pytestmark = pytest.mark.comfy

HOSTILE = [pytest.param("../escape", marks=pytest.mark.compat)]
HOSTILE += ["/etc/passwd", "..\\escape", "C:\\escape", "a/b", "", "con", "x\0y"]
HOSTILE += [
    "\\\\server\\share",
    "nul .txt",
    "x" * 10_000,
    "\uff0e\uff0e\uff0fescape",
    "a\u202eb",
    "a\u200bb",
    "\x1b[2J",
]


@pytest.fixture
def session(server) -> str:
    """A valid session of flux-tiny."""
    name = "good"
    if not (server.output / "hswq_stats" / f"{name}.pt").exists():
        server.client.run(flow.calibration(workflow(server, session=name))).check()
    return name


def workflow(server, **settings) -> Prompt:
    return flow.prepare(server, "flux", flow.CALIBRATE, **settings)


def convert(server, session: str, **settings):
    """The result of a conversion, and the files it left behind."""
    before = files_in(server)
    settings = {"session": session, "method": "hswq", **settings}
    result = server.client.run(flow.conversion(server, workflow(server), **settings))
    return result, files_in(server) - before


def files_in(server) -> set[Path]:
    return {path for path in server.output.rglob("*") if path.is_file() and path.suffix != ".lock"}


def refused(server, session: str, *words: str, **settings) -> None:
    result, files = convert(server, session, **settings)
    assert result.status in ("error", "rejected")
    for word in words:
        assert word in " ".join(result.errors)
    assert not files


@pytest.mark.compat
def test_no_statistics_file(server):
    refused(server, "never_made", "never_made.pt", "no such file", "Calibration node first")


def test_model_aware_without_recorded_calls(server, session):
    folder = server.output / "hswq_stats"
    shutil.copy(folder / f"{session}.pt", folder / "stateless.pt")
    refused(
        server,
        "stateless",
        "stateless.states.safetensors",
        "no such file",
        "states above 0",
        "method hswq",
        method="model_aware",
    )


def test_model_aware_with_calls_of_another_model(server, session):
    folder = server.output / "hswq_stats"
    server.client.run(flow.calibration(flow.prepare(server, "sd15", flow.CALIBRATE, session="strange"))).check()
    shutil.copy(folder / f"{session}.pt", folder / "mixed.pt")
    shutil.copy(folder / "strange.states.safetensors", folder / "mixed.states.safetensors")
    refused(server, "mixed", "model calls of another model", "another session name", method="model_aware")


def test_model_aware_with_too_few_calls(server):
    server.client.run(flow.calibration(workflow(server, session="few", steps=2))).check()
    refused(server, "few", "2 model calls", "at least 4", method="model_aware")


def test_statistics_of_another_architecture(server, session):
    path = server.output / "hswq_stats" / "foreign.pt"
    server.client.run(flow.calibration(flow.prepare(server, "sd15", flow.CALIBRATE, session="foreign"))).check()
    refused(server, path.stem, "Session foreign", "another layer layout", "another session name")


@pytest.mark.compat
def test_statistics_of_other_weights(server, models, session):
    other = server.add_model("diffusion_models", tiny.make("flux-tiny", seed=1), "flux-other.safetensors")
    changed = graph.set_input(workflow(server, session=session), "UNETLoader", unet_name=other)
    result = server.client.run(flow.conversion(server, changed))
    assert "same architecture with other weights" in result.errors[0]
    calibrating = server.client.run(flow.calibration(changed))
    assert "same architecture with other weights" in calibrating.errors[0]
    assert load_session(server.output / "hswq_stats" / f"{session}.pt").calls == 2


def test_an_empty_session(server, session):
    folder = server.output / "hswq_stats"
    empty = load_session(folder / f"{session}.pt")
    empty.calls, empty.history = 0, ()
    save_session(empty, folder / "empty.pt")
    refused(server, "empty", "Session empty", "no completed model call", "Queue the workflow")


def test_a_session_without_one_layer(server, session):
    folder = server.output / "hswq_stats"
    partial = load_session(folder / f"{session}.pt")
    del partial.layers["img_in"]
    save_session(partial, folder / "partial.pt")
    refused(server, "partial", "partial", "session")


def test_a_damaged_session(server, session):
    folder = server.output / "hswq_stats"
    (folder / "damaged.pt").write_bytes((folder / f"{session}.pt").read_bytes()[:1000])
    refused(server, "damaged", "damaged.pt", "unreadable", "Calibrate again")


@pytest.mark.parametrize("ratio", [pytest.param(-0.1, marks=pytest.mark.compat), 1.5])
def test_keep_ratio_out_of_range(server, session, ratio):
    refused(server, session, "keep_ratio", keep_ratio=ratio)


@pytest.mark.parametrize(
    ("settings", "texts"),
    [
        ({"format": "comfy", "scale_per": "channel"}, ("scale_per", "channel with format comfy", "format v2")),
        ({"format": "v2", "fast_matmul": 3.0}, ("fast_matmul", "3 dB with format v2", "format comfy")),
        ({"format": "v2", "scale_per": "channel"}, ("scale_per", "with method hswq", "method model_aware")),
        ({"format": "comfy", "fast_matmul": 3.0}, ("fast_matmul", "with method hswq", "method model_aware")),
        ({"format": "comfy", "fast_matmul": 200.0}, ("fast_matmul",)),
    ],
)
def test_an_option_that_format_or_method_has_not(server, session, settings, texts):
    refused(server, session, *texts, **{"method": "hswq", **settings})


@pytest.mark.parametrize("name", HOSTILE)
def test_a_session_name_never_leaves_its_folder(server, name):
    result, files = convert(server, name)
    assert result.status == "rejected"
    assert "session" in result.errors[0].lower()
    assert not files
    wrong = graph.set_input(workflow(server), "HSWQCalibration", session=name)
    calibrating = server.client.run(flow.calibration(wrong))
    assert calibrating.status == "rejected"


@pytest.mark.parametrize(
    "prefix",
    [pytest.param("../escape", marks=pytest.mark.compat), "/abs", "a/../../b", "x\0", "a/" * 50 + "x", "\uff0fabs"],
)
def test_a_filename_prefix_never_leaves_the_output_folder(server, session, prefix):
    refused(server, session, "filename_prefix", filename_prefix=prefix)


def test_a_link_out_of_the_output_folder_is_not_followed(server, session, tmp_path):
    """No session or file is written into it, and none is read through it."""
    folder = server.output / "hswq_stats"
    (tmp_path / "secret.pt").write_bytes((folder / f"{session}.pt").read_bytes())
    (folder / "linked.pt").symlink_to(tmp_path / "secret.pt")
    refused(server, "linked", "link that leads out")
    (folder / "linked.pt").unlink()
    away = server.output / "diffusion_models" / "away"
    away.parent.mkdir(exist_ok=True)
    away.symlink_to(tmp_path)
    refused(server, session, "link that leads out", filename_prefix="away/x")
    away.unlink()  # ComfyUI lists no models while there is a dangling link
    assert [path.name for path in tmp_path.iterdir()] == ["secret.pt"]


@pytest.mark.parametrize(
    ("attack", "words"),
    [
        ("a compressed archive (128 MB in 130 KB)", "compressed"),
        ("a pickle that runs a command", "posix.system"),
        ("a tensor of 16 GB in 8 bytes", "does not hold"),
        ("lists in lists, 400,000 deep", "got a list"),
        ("a layer with terminal codes", "a name is expected"),
    ],
)
def test_a_hostile_session_is_refused_by_name(server, session, attack, words):
    SESSIONS[attack](server.output / "hswq_stats" / "hostile.pt")
    refused(server, "hostile", "hostile.pt", words)


def test_hostile_states_are_refused_by_name(server, session):
    folder = server.output / "hswq_stats"
    shutil.copy(folder / f"{session}.pt", folder / "odd.pt")
    STATES["an argument that is taken"](folder / "odd.states.safetensors")
    refused(server, "odd", "odd.states.safetensors", "transformer_options", method="model_aware")


def test_a_hostile_checkpoint_is_refused_by_name(server):
    for attack in ("JSON 100,000 deep", "two tensors in one place"):
        path = server.output / "diffusion_models" / "hostile.safetensors"
        path.parent.mkdir(exist_ok=True)
        CHECKPOINTS[attack](path)
        load = flow.opening(flow.prepare(server, "flux", flow.LOAD), path.name, "diffusion_models", stock=False)
        result = server.client.run(load)
        path.unlink()
        assert "hostile.safetensors" in result.errors[0]
        assert "expected a readable .safetensors file" in result.errors[0]


def test_a_prefix_may_name_a_subfolder(server, session):
    result, files = convert(server, session, filename_prefix="mine/best")
    result.check()
    names = sorted(path.relative_to(server.output).as_posix() for path in files)
    stem = "diffusion_models/mine/best_flux-tiny_hswq_r2_0.25_comfy"
    assert names == [f"{stem}.plan.json", f"{stem}.safetensors"]


@pytest.mark.compat
def test_an_already_quantized_model(server, session):
    result, files = convert(server, session, filename_prefix="quantized")
    result.check()
    (file,) = (path for path in files if path.suffix == ".safetensors")
    name = str(file.relative_to(server.output / "diffusion_models"))
    load = flow.opening(flow.prepare(server, "flux", flow.LOAD), name, "diffusion_models", stock=True)
    calibration = prompts.node("HSWQCalibration", model=None, session="fp8", save_every=50)
    loader = graph.find(load, "UNETLoader")
    calibration["inputs"]["model"] = [loader, 0]
    result = server.client.run(prompts.insert(load, "calibration", calibration, after=loader))
    assert "already quantized (FP8)" in result.errors[0]
    settings = {"session": session, "format": "v2", "method": "hswq", "filename_prefix": ""}
    settings |= {"extra_percent": 3.0, "keep_ratio": 0.25}
    converter = prompts.node("HSWQConverter", model=[loader, 0], **settings)
    result = server.client.run({loader: load[loader], "convert": converter})
    assert "already quantized (FP8)" in result.errors[0]


def test_an_unwritable_folder(server, session):
    """Uses a file in place of the folder: permission bits would not stop a root user."""
    folder = server.output / "diffusion_models" / "blocked"
    folder.parent.mkdir(exist_ok=True)
    folder.write_text("in the way")
    result, files = convert(server, session, filename_prefix="blocked/x")
    assert "blocked" in result.errors[0]
    assert "permissions" in result.errors[0]
    assert not files


def test_only_one_of_clip_and_vae(server):
    settings = {"session": "half"}
    server.client.run(flow.calibration(flow.prepare(server, "sd15", flow.CALIBRATE, **settings))).check()
    prompt = flow.conversion(server, flow.prepare(server, "sd15", flow.CALIBRATE, **settings))
    del prompt[graph.find(prompt, "HSWQConverter")]["inputs"]["vae"]
    result = server.client.run(prompt)
    assert "only one of them connected" in result.errors[0]


@pytest.mark.compat
def test_a_compiled_model_under_calibration(server):
    prompt = flow.calibration(workflow(server, session="compiled"))
    compiled = prompts.node("TorchCompileModel", model=None, backend="inductor")
    for after in (graph.find(prompt, "UNETLoader"), graph.find(prompt, "HSWQCalibration")):
        compiled["inputs"]["model"] = [after, 0]
        result = server.client.run(prompts.insert(prompt, "compiled", compiled, after=after))
        assert "torch.compile" in result.errors[0]
        assert "Bypass the compile node" in result.errors[0]
    assert not (server.output / "hswq_stats" / "compiled.pt").exists()


@pytest.mark.parametrize(
    ("method", "stage"), [pytest.param("hswq", "Searching", marks=pytest.mark.compat), ("model_aware", "Drawing")]
)
def test_cancel_leaves_nothing_behind(server, method, stage):
    settings = {"session": f"cancelled_{method}"}
    server.client.run(flow.calibration(flow.prepare(server, "sdxl", flow.CALIBRATE, **settings))).check()
    prompt = flow.conversion(server, flow.prepare(server, "sdxl", flow.CALIBRATE, **settings), method=method)
    before = files_in(server)
    with server.client.listen() as heard:
        queued = server.client.submit(prompt)
        until(lambda: any(stage in text for text in heard.progress_text()))
        server.client.interrupt()
        result = server.client.wait(queued)
    assert result.status == "interrupted"
    assert files_in(server) == before
