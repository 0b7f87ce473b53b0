"""``convert``: file to file, a tensor or two in memory at a time."""

from __future__ import annotations

import argparse
import logging
from itertools import chain
from pathlib import Path

import torch

from ..calibration.session import load_session
from ..convert.file import HSWQ, FileJob, FileMethod, file_method
from ..errors import HSWQError
from ..methods.learned import LearnedOptions
from ..model.presets import preset_named
from .progress import bar

log = logging.getLogger("hswq")


def convert(options: argparse.Namespace) -> bool:
    """Every file; one that fails does not stop the others. Whether all went well."""
    method = _method(options)
    failed = [path.name for path in chain.from_iterable(options.files) if not _done(path, method, options)]
    if failed:
        log.error("Not converted: %s", ", ".join(failed))
    return not failed


def _method(options: argparse.Namespace) -> FileMethod:
    session = None
    if options.method == HSWQ and options.session is not None:
        session = load_session(options.session)
        session.require_statistics(f"Session {options.session.name}")
    learned = LearnedOptions(options.iterations, options.samples, options.seed)
    return file_method(options.method, session, options.keep_ratio, learned)


def _done(path: Path, method: FileMethod, options: argparse.Namespace) -> bool:
    try:
        _one(path, method, options)
    except HSWQError as error:
        log.error("%s", error)
        return False
    return True


def _one(path: Path, method: FileMethod, options: argparse.Namespace) -> None:
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    job = FileJob.open(path, method, options.format, preset_named(options.preset), device)
    target = job.target(options.output or path.parent)
    if options.dry_run:
        model = job.model
        log.info("%s: %s, %d layers, would be written to %s", path, model.family.name, len(model.layers), target)
        return
    with bar() as progress:
        done, text = job.write(target, progress)
    log.info("%s\n%s", done.path, text)
