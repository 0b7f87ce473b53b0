"""A session's name may come through a link: from another node, or from a widget shared by several nodes."""

from __future__ import annotations

import pytest
from rig import flow, graph

pytestmark = [pytest.mark.comfy, pytest.mark.compat]

NAME = {"class_type": "PrimitiveString"}


def linked(prompt, name):
    """The prompt with every `session` linked to one node that says ``name``."""
    changed = {key: {**entry, "inputs": dict(entry["inputs"])} for key, entry in prompt.items()}
    for entry in changed.values():
        if "session" in entry["inputs"]:
            entry["inputs"]["session"] = ["name", 0]
    return {**changed, "name": {**NAME, "inputs": {"value": name}}}


def test_calibration_and_converters_take_a_linked_session(server):
    prompt = flow.prepare(server, "flux", flow.CALIBRATE)
    prompt = graph.set_input(prompt, "HSWQConverter", method="hswq", filename_prefix="session_by_link")
    server.client.run(linked(prompt, "over_a_link")).check()
    assert (server.output / "hswq_stats" / "over_a_link.pt").exists()
    assert len(list((server.output / "diffusion_models").glob("session_by_link*.safetensors"))) == 1
    inputs = {"file": "diffusion_models/flux-tiny.safetensors", "format": "comfy", "method": "hswq", "preset": "auto"}
    file = {"class_type": "HSWQFileConverter", "inputs": {**inputs, "session": "", "filename_prefix": "by_link"}}
    server.client.run(linked({"file": file}, "over_a_link")).check()
    assert len(list((server.output / "diffusion_models").glob("by_link*.safetensors"))) == 1


def test_a_report_takes_a_linked_session_and_waits_for_the_picture(server):
    """Without waiting there would be no session of that name yet; one more picture changes the report."""
    prompt = flow.calibration(flow.prepare(server, "flux", flow.CALIBRATE, seed=41))
    picture = [graph.find(prompt, "VAEDecode"), 0]
    report = {"class_type": "HSWQReport", "inputs": {"session": "", "file": "none", "after": picture}}
    table = {"class_type": "PreviewAny", "inputs": {"source": ["report", 1]}}
    whole = linked({**prompt, "report": report, "table": table}, "reported_at_once")
    assert "2 calls" in server.client.run(whole).check().text()[-1]
    again = graph.set_input(whole, "KSampler", seed=42)
    assert "4 calls" in server.client.run(again).check().text()[-1]


def test_a_bad_linked_name_is_refused_when_the_node_runs(server):
    result = server.client.run(linked(flow.prepare(server, "flux", flow.CALIBRATE), "../escape"))
    assert result.status == "error"
    assert "Session name: got '../escape'" in " ".join(result.errors)
    assert not list(server.base.rglob("escape*"))
