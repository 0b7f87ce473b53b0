"""Empty stand-ins for the model files that templates name, so that the page reports none as missing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from make.templates.jobs import TEMPLATES

FOLDERS = {
    "ckpt_name": "checkpoints",
    "unet_name": "diffusion_models",
    "model_name": "diffusion_models",
    "clip_name": "text_encoders",
    "clip_name1": "text_encoders",
    "clip_name2": "text_encoders",
    "vae_name": "vae",
    "file": "",
}


def model_files() -> Iterator[str]:
    """`folder/name` of every model file in all templates, some more than once."""
    for template in TEMPLATES:
        for entry in template.prompt.values():
            for name in entry["inputs"].keys() & FOLDERS.keys():
                yield f"{FOLDERS[name]}/{entry['inputs'][name]}".removeprefix("/")


def offer_models(base: Path) -> list[Path]:
    """Create the missing ones in a ComfyUI base directory; returns those created."""
    made = [path for name in set(model_files()) if not (path := base / "models" / name).exists()]
    for path in made:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return made
