"""Arguments, messages and exit codes: 0 success, 1 failure (reported on stderr), 2 bad arguments, 130 Ctrl+C."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from glob import glob
from pathlib import Path

from ..errors import HSWQError
from ..methods.hswq import DEFAULT_KEEP_RATIO, HSWQ
from ..methods.learned import LearnedOptions
from ..methods.table import METHODS
from ..model.presets import AUTO, PRESETS
from ..plan.formats import FORMATS
from . import convert, look, merge

log = logging.getLogger("hswq")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    options = _parser().parse_args(arguments)
    level = logging.WARNING if options.quiet else logging.DEBUG if options.verbose else logging.INFO
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr, force=True)
    run: Callable[[argparse.Namespace], bool] = options.run
    try:
        return 0 if run(options) else 1
    except HSWQError as error:
        log.error("%s", error)
        return 1
    except KeyboardInterrupt:
        log.error("Stopped: nothing was left half-written.")
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m hswq_core", description="FP8 files by HSWQ, without ComfyUI.")
    parser.add_argument("-q", "--quiet", action="store_true", help="say only what is wrong; no progress")
    parser.add_argument("-v", "--verbose", action="store_true", help="say more")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _convert(commands.add_parser("convert", help="write FP8 files"))
    inspect = commands.add_parser("inspect", help="what is in a file or session")
    inspect.add_argument("file", type=Path, help=".safetensors or .pt")
    inspect.add_argument("--json", action="store_true", help="for programs")
    inspect.set_defaults(run=look.inspect)
    join = commands.add_parser("merge", help="add up sessions of one model, recorded on several machines")
    join.add_argument("sessions", nargs="+", type=Path, help=".pt, two or more")
    join.add_argument("-o", "--output", type=Path, required=True, help="a new .pt")
    join.set_defaults(run=merge.merge)
    difference = commands.add_parser("compare", help="SQNR of every weight of a file against another")
    difference.add_argument("original", type=Path)
    difference.add_argument("converted", type=Path)
    difference.add_argument("--json", action="store_true", help="for programs")
    difference.set_defaults(run=look.compare)
    check = commands.add_parser("verify", help="whether files are whole and their scales usable")
    check.add_argument("files", nargs="+", type=_paths)
    check.set_defaults(run=look.verify)
    return parser


def _convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", type=_paths, help=".safetensors; * and ? stand for many")
    parser.add_argument("--session", type=Path, help="statistics of this model, output/hswq_stats/NAME.pt of ComfyUI")
    parser.add_argument("--format", choices=sorted(FORMATS), default="v2")
    parser.add_argument("--method", choices=METHODS, default=HSWQ.name, help="hswq needs a session")
    presets = "; ".join(f"{row.name}: {row.help}" for row in PRESETS.values())
    parser.add_argument("--preset", choices=PRESETS, default=AUTO, help=presets)
    parser.add_argument(
        "--keep-ratio", type=float, default=DEFAULT_KEEP_RATIO, help="share of the layers kept in 16 bits, for hswq"
    )
    learned = LearnedOptions()
    parser.add_argument("--iterations", type=int, default=learned.iterations, help="sweeps at most, for learned")
    parser.add_argument("--samples", type=int, default=learned.samples, help="singular directions, for learned")
    parser.add_argument("--seed", type=int, default=learned.seed, help="for learned")
    parser.add_argument("--device", help="where to compute: cpu, cuda, cuda:1; default: the GPU if there is one")
    parser.add_argument("-o", "--output", type=Path, help="folder, default: beside the source")
    parser.add_argument("-n", "--dry-run", action="store_true", help="say what would be written")
    parser.set_defaults(run=convert.convert)


def _paths(text: str) -> list[Path]:
    """Expand a pattern where the shell does not (Windows); plain names are returned as they are."""
    if not set(text) & set("*?["):
        return [Path(text)]
    matches = [Path(name) for name in sorted(glob(text))]  # noqa: PTH207 - the pattern may be absolute
    if not matches:
        raise argparse.ArgumentTypeError(f"{text}: no such file")
    return matches
