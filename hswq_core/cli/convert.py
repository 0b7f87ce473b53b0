"""``convert``: file to file, with one or two tensors in memory at a time."""

from __future__ import annotations

import argparse
import logging
from itertools import chain
from pathlib import Path

import torch

from ..calibration.session import Session, load_session
from ..convert.file import FileJob, FileRequest
from ..errors import HSWQError
from ..methods.method import SESSION, method_named
from ..methods.table import METHODS
from .progress import bar

log = logging.getLogger("hswq")


def convert(options: argparse.Namespace) -> bool:
    """Convert every file, continuing after failures; True if all succeeded."""
    request = _request(options)
    failed = [path.name for path in chain.from_iterable(options.files) if not _convert_or_log(path, request, options)]
    if failed:
        log.error("Not converted: %s", ", ".join(failed))
    return not failed


def _request(options: argparse.Namespace) -> FileRequest:
    needed = SESSION in method_named(options.method, METHODS).needs and options.session is not None
    session = _session(options.session) if needed else None
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return FileRequest.named(
        options.method, options.format, options, session=session, preset=options.preset, device=device
    )


def _session(path: Path) -> Session:
    session = load_session(path)
    session.require_statistics(f"Session {path.name}")
    return session


def _convert_or_log(path: Path, request: FileRequest, options: argparse.Namespace) -> bool:
    try:
        _convert_file(path, request, options)
    except HSWQError as error:
        log.error("%s", error)
        return False
    return True


def _convert_file(path: Path, request: FileRequest, options: argparse.Namespace) -> None:
    job = FileJob.open(path, request)
    target = job.target(options.output or path.parent)
    if options.dry_run:
        model = job.model
        log.info("%s: %s, %d layers, would be written to %s", path, model.family.name, len(model.layers), target)
        return
    with bar() as progress:
        done = job.write(target, progress)
    log.info("%s\n%s", done.path, done.report)
