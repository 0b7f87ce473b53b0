"""A ComfyUI base directory: models, custom nodes, input, output and user settings in one folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from rig.pack import ROOT

PACK_NAME = "ComfyUI-HSWQ"
USER = "user/default"
FOLDERS = ("custom_nodes", "input", "output", "temp", f"{USER}/workflows", f"{USER}/subgraphs")
MODEL_KINDS = (
    "checkpoints",
    "configs",
    "diffusion_models",
    "embeddings",
    "loras",
    "text_encoders",
    "vae",
)
NOT_COPIED = shutil.ignore_patterns(".*", "__pycache__", "*.tmp", "bench", "tests")
# Without this, the first visit to the page opens the template browser over the graph.
SETTINGS = {"Comfy.TutorialCompleted": True, "Comfy.Workflow.ShowMissingModelsWarning": False}
# The page requests the rest and logs an error when it is missing.
USER_FILES = {
    "comfy.settings.json": json.dumps(SETTINGS),
    "comfy.templates.json": "{}",
    "user.css": "",
}


def prepare(base: Path, packs: Iterable[Path] = ()) -> None:
    """Make the folders of `base`, and put our pack and `packs` into its custom_nodes."""
    for name in (*FOLDERS, *(f"models/{kind}" for kind in MODEL_KINDS)):
        (base / name).mkdir(parents=True, exist_ok=True)
    for name, text in USER_FILES.items():
        file = base / USER / name
        if not file.exists():
            file.write_text(text, encoding="utf-8")
    link(ROOT, base / "custom_nodes" / PACK_NAME)
    for pack in packs:
        link(pack.resolve(), base / "custom_nodes" / pack.name)


def link(source: Path, target: Path) -> Path:
    """Make the file or folder `source` appear as `target`: by symlink, else hard link, else copy."""
    if os.path.lexists(target):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        target.symlink_to(source, target_is_directory=source.is_dir())
    except OSError:  # Windows without developer mode
        _link_without_symlinks(source, target)
    return target


def _link_without_symlinks(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, ignore=NOT_COPIED)
        return
    try:
        os.link(source, target)
    except OSError:  # another volume
        shutil.copy2(source, target)


def write_model_paths(base: Path, models: Path) -> Path:
    """Write a model path file for ComfyUI that adds the folders of `models`; JSON is valid YAML."""
    if not models.is_dir():
        raise NotADirectoryError(f"models folder {models}: not found")
    kinds = sorted(child.name for child in models.iterdir() if child.is_dir())
    config = {"rig": {"base_path": str(models.resolve()), **{kind: kind for kind in kinds}}}
    path = base / "model_paths.yaml"
    path.write_text(json.dumps(config), encoding="utf-8")
    return path
