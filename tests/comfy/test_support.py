"""What the log says when the pack cannot work with the ComfyUI that starts."""

from __future__ import annotations

import sys

import pytest

pytestmark = pytest.mark.comfy


@pytest.fixture
def require(comfy):
    from hswq.loader.support import require_comfyui

    return require_comfyui


@pytest.mark.compat
def test_the_tested_versions_are_supported(require):
    require()


@pytest.mark.parametrize("version", ["0.18.1", "0.16.3", "0.3.64", "0.18", ""])
def test_an_older_comfyui_is_named(require, monkeypatch, version):
    import comfyui_version

    monkeypatch.setattr(comfyui_version, "__version__", version)
    with pytest.raises(ImportError, match=r"expected 0\.18\.2 or newer. Update ComfyUI"):
        require()


@pytest.mark.parametrize("version", ["0.18.2", "0.19.0", "1.0", "0.30.0.dev1"])
def test_newer_ones_are_let_in(require, monkeypatch, version):
    import comfyui_version

    monkeypatch.setattr(comfyui_version, "__version__", version)
    require()


def test_one_without_a_version_is_older_still(require, monkeypatch):
    monkeypatch.setitem(sys.modules, "comfyui_version", None)
    with pytest.raises(ImportError, match="got none that says its version"):
        require()


def test_a_comfyui_without_comfy_kitchen_is_told_what_to_install(require, monkeypatch):
    monkeypatch.setitem(sys.modules, "comfy_kitchen", None)
    with pytest.raises(ImportError, match=r"comfy-kitchen.*Install ComfyUI's requirements\.txt"):
        require()
