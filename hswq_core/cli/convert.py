"""``convert``: file to file, one tensor in memory at a time."""

from __future__ import annotations

import argparse
import logging
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from ..atomic import require_writable
from ..convert import report, write_plan
from ..errors import HSWQError, SettingError
from ..exclusions import Exclusions
from ..file_model import FileModel
from ..formats import FileFormat, format_named
from ..hswq import check_keep_ratio, plan_hswq
from ..learned import LearnedOptions, plan_learned
from ..names import describe, output_path
from ..nearest import plan_nearest
from ..plan import Plan, Progress
from ..session import Session, load_session
from ..workspace import Workspace, passing_workspace
from .progress import bar

log = logging.getLogger("hswq")

METHODS = ("hswq", "learned", "nearest")


@dataclass(frozen=True)
class Wish:
    """What is asked for.

    Attributes:
        session: None for the methods that need none.
        learned: of method learned, None for the others.
        folder: of the new files; None: beside the source.
    """

    file_format: FileFormat
    keep_ratio: float
    session: Session | None
    folder: Path | None
    dry_run: bool
    learned: LearnedOptions | None = None

    def plan(self, model: FileModel, solutions: Workspace, progress: Progress) -> Plan:
        """Decide about every layer; codes that are not nearest's go to ``solutions``."""
        exclusions = Exclusions(model.family)
        if self.learned is not None:
            return plan_learned(
                model.layers,
                model.read,
                solutions.add,
                exclusions=exclusions,
                file_format=self.file_format,
                options=self.learned,
                progress=progress,
            )
        if self.session is None:
            return plan_nearest(
                model.layers, model.read, exclusions=exclusions, file_format=self.file_format, progress=progress
            )
        return plan_hswq(
            model.layers,
            self.session,
            model.read,
            exclusions=exclusions,
            file_format=self.file_format,
            keep_ratio=self.keep_ratio,
            progress=progress,
        )

    def target(self, model: FileModel) -> Path:
        """A free name."""
        if self.session is None:
            tail = f"{'nearest' if self.learned is None else 'learned'}_{self.file_format.name}"
        else:
            tail = describe(self.session.calls, f"{self.keep_ratio:g}", self.file_format.name)
        return output_path(self.folder or model.source.path.parent, "", f"{model.source.name}_{tail}")


def convert(options: argparse.Namespace) -> bool:
    """Every file; one that fails does not stop the others. Whether all went well."""
    wish = _wish(options)
    failed = [path.name for path in chain.from_iterable(options.files) if not _done(path, wish)]
    if failed:
        log.error("Not converted: %s", ", ".join(failed))
    return not failed


def _done(path: Path, wish: Wish) -> bool:
    try:
        _one(path, wish)
    except HSWQError as error:
        log.error("%s", error)
        return False
    return True


def _wish(options: argparse.Namespace) -> Wish:
    session = None
    if options.method == "hswq":
        if options.session is None:
            raise SettingError(
                "--session",
                got="none",
                expected="the statistics of this model, for method hswq",
                remedy="Calibrate it in ComfyUI and pass output/hswq_stats/NAME.pt, or choose another --method.",
            )
        session = load_session(options.session)
        session.require_statistics(f"Session {options.session.name}")
    ratio = check_keep_ratio(options.keep_ratio)
    learned = None
    if options.method == "learned":
        learned = LearnedOptions(options.iterations, options.samples, options.seed)
    return Wish(format_named(options.format), ratio, session, options.output, options.dry_run, learned)


def _one(path: Path, wish: Wish) -> None:
    model = FileModel(path, wish.session)
    target = wish.target(model)
    if wish.dry_run:
        log.info("%s: %s, %d layers, would be written to %s", path, model.family.name, len(model.layers), target)
        return
    require_writable(target.parent)
    with bar() as progress, passing_workspace(target.parent) as solutions:
        plan = wish.plan(model, solutions, progress)
        done = write_plan(
            target, model.source, model.prefix, plan, wish.session, solutions=solutions, progress=progress
        )
    log.info("%s\n%s", done.path, report(done, wish.session))
