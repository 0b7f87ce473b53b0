"""The same session, model and settings give the same bytes, in this process and in other ones."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hswq.hswq_core.files.checkpoint import FileSource
from rig import flow, pack, tiny
from rig.environment import child_environment

pytestmark = pytest.mark.comfy

SETTINGS = [
    {"format": "v2", "method": "hswq"},
    {"format": "comfy", "method": "model_aware", "fast_matmul": 3.0},
    {"format": "v2", "method": "model_aware", "scale_per": "channel"},
]


def converted(server, prefix: str, session: str, **settings) -> bytes:
    prompt = flow.conversion(
        server, flow.prepare(server, "flux", flow.CALIBRATE), session=session, filename_prefix=prefix, **settings
    )
    server.client.run(prompt).check()
    (file,) = (server.output / "diffusion_models").glob(f"{prefix}_*.safetensors")
    return file.read_bytes()


def test_the_converter_in_two_processes(server):
    """The server is restarted in between: a different process, the same session on disk."""
    server.client.run(
        flow.calibration(flow.prepare(server, "flux", flow.CALIBRATE, session="determined", steps=4))
    ).check()
    first = [converted(server, f"first{i}", "determined", **row) for i, row in enumerate(SETTINGS)]
    again = [converted(server, f"again{i}", "determined", **row) for i, row in enumerate(SETTINGS)]
    server.restart()
    anew = [converted(server, f"anew{i}", "determined", **row) for i, row in enumerate(SETTINGS)]
    assert first == again
    assert first == anew
    file = next((server.output / "diffusion_models").glob("first0_*.safetensors"))
    assert json.loads(FileSource(file).metadata["hswq"])["made_with"].keys() == {"torch", "device"}


# Two threads, which could add up in another order; they do not spin while they wait, since tests run beside them.
TWO_THREADS = child_environment(2, {"OMP_WAIT_POLICY": "passive"})


@pytest.mark.parametrize("method", ["nearest", "learned"])
def test_file_to_file_in_two_processes(tmp_path, method):
    made = []
    for name in ("one", "two"):
        command = [sys.executable, "-m", "hswq_core", "convert", str(tiny.make("flux-tiny")), "--method", method]
        command += ["--format", "v2", "--iterations", "2", "-o", str(tmp_path / name)]
        command = command if method == "learned" else [word for word in command if word not in ("--iterations", "2")]
        subprocess.run(command, cwd=pack.ROOT, env=TWO_THREADS, check=True, capture_output=True)
        made.append(next(Path(tmp_path / name).glob("*.safetensors")).read_bytes())
    assert made[0] == made[1]
