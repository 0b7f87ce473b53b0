"""pyproject.toml as ComfyUI itself reads it, and what a registry requires."""

from __future__ import annotations

import re

import pytest
from rig.pack import ROOT

pytestmark = [pytest.mark.comfy, pytest.mark.compat]


@pytest.fixture
def config(comfy):
    from comfy_config.config_parser import extract_node_configuration

    return extract_node_configuration(str(ROOT))


def test_comfyui_reads_every_field(config):
    project, comfy = config.project, config.tool_comfy
    assert re.fullmatch(r"[a-z]+([-_.]?[a-z0-9]+)*", project.name)
    assert len(project.name) < 100
    assert re.fullmatch(r"\d+\.\d+\.\d+", project.version)
    assert project.description
    assert project.license.file == "LICENSE"
    assert project.supported_os == ["OS Independent"]  # a single classifier unknown to ComfyUI would empty these
    assert project.supported_accelerators == ["GPU :: NVIDIA CUDA"]
    assert comfy.publisher_id
    assert comfy.display_name == "HSWQ"
    assert comfy.web is None  # would serve web/ under the project's name, where the page does not look for help


def test_the_version_floor_is_the_one_that_is_enforced(config):
    from hswq.loader.support import MINIMUM

    assert config.project.supported_comfyui_version == ">=" + ".".join(map(str, MINIMUM))


def test_both_ways_to_install_bring_the_same(config):
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    required = [line.split("#")[0].strip() for line in lines]
    assert config.project.dependencies == [name for name in required if name]
