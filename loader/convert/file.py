"""Files that ComfyUI lists, converted without opening them as models: even files too large for that."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

import folder_paths

from ...hswq_core.calibration.session import load_session
from ...hswq_core.convert.conversion import Conversion
from ...hswq_core.convert.file import FileJob, FileRequest
from ...hswq_core.convert.file_model import FileModel
from ...hswq_core.errors import SettingError
from ...hswq_core.files.checkpoint import CHECKPOINT_PREFIX
from ...hswq_core.methods.hswq import DEFAULT_KEEP_RATIO
from ...hswq_core.model.presets import AUTO
from ...hswq_core.plan.formats import format_named
from ...hswq_core.plan.plan import Plan
from ...hswq_core.progress import Progress
from ..devices import make_room, search_device
from ..job import output_folder
from ..open.verify import verify_file
from ..sessions.store import path_of

log = logging.getLogger(__name__)

FOLDERS = ("diffusion_models", "checkpoints", "text_encoders")
EXTENSION = ".safetensors"


def listed_files() -> list[str]:
    """``<folder>/<name>`` of every file that could be converted."""
    return [
        f"{folder}/{name}"
        for folder in FOLDERS
        for name in folder_paths.get_filename_list(folder)
        if name.endswith(EXTENSION)
    ]


def listed_path(file: str) -> Path:
    """Where a listed file is. Raises SettingError if it is not listed (any more)."""
    folder, _, name = file.partition("/")
    path = folder_paths.get_full_path(folder, name) if folder in FOLDERS else None
    if path is None:
        raise SettingError(
            "file",
            got=repr(file),
            expected=f"one of {', '.join(FOLDERS)}, and a file in it",
            remedy="Press R to list the files anew, and choose one.",
        )
    return Path(path)


def given_path(path: str) -> Path:
    """A file that a workflow gives by path. Raises SettingError if it is outside ComfyUI's output and model folders."""
    # Not resolved: people symlink their model folders to other disks.
    absolute = Path(os.path.abspath(path))  # noqa: PTH100 - Path.resolve follows links
    roots = [folder_paths.get_output_directory(), folder_paths.models_dir]
    roots += [root for folder in FOLDERS for root in folder_paths.get_folder_paths(folder)]
    inside = any(absolute.is_relative_to(os.path.abspath(root)) for root in roots)  # noqa: PTH100
    if not inside or absolute.suffix != EXTENSION or not absolute.is_file():
        raise SettingError(
            "path",
            got=repr(path),
            expected=f"a {EXTENSION} file in ComfyUI's output folder or its folders of models",
            remedy="Connect the path output of HSWQ Converter or HSWQ File Converter, or choose a file instead.",
        )
    return absolute


@dataclass(frozen=True)
class ListedRequest:
    """What the user asked for; see the File Converter node's inputs.

    Attributes:
        file: as ``listed_files`` gives it.
        session: name of a calibration session of this model, for methods that need one; else "".
    """

    file: str
    file_format: str
    method: str
    preset: str = AUTO
    session: str = ""
    keep_ratio: float = DEFAULT_KEEP_RATIO
    filename_prefix: str = ""


def convert_listed(asked: ListedRequest, progress: Progress) -> Conversion:
    """Convert one file and write it where ComfyUI's loaders look.

    Raises:
        HSWQError: wrong setting, missing or foreign statistics, unwritable folder, a file that would not open.
    """
    row, device = format_named(asked.file_format), search_device()
    statistics = load_session(path_of(asked.session)) if asked.session else None
    request = FileRequest.named(
        asked.method, row.name, asked, session=statistics, preset=asked.preset, device=str(device)
    )
    job = FileJob.open(listed_path(asked.file), request)
    make_room(job.model.layers, device)

    def check(temporary: Path, plan: Plan) -> None:
        if not job.model.family.text_encoder:
            verify_file(temporary, plan, row)

    done = job.write(job.target(_folder(job.model), asked.filename_prefix), progress, check)
    log.info("HSWQ: %s: %s", done.path.name, done.plan.accounting())
    return done


def _folder(model: FileModel) -> Path:
    if model.family.text_encoder:
        return Path(folder_paths.get_output_directory()) / "clip"  # ComfyUI's name for that output folder
    return output_folder(whole=model.prefix == CHECKPOINT_PREFIX)
