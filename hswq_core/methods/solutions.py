"""Progress of a long conversion, kept on disk: memory holds one layer, and a crash loses only the current one.

Folder ``<session>.work/<key>/``: one safetensors file per rounded layer (the scheme's tensors and ``bias``; the rest in
its metadata) and ``<stage>.json`` for numbers. The key is a hash of everything the results depend on; folders with
other keys are obsolete and are removed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from tempfile import mkdtemp

from safetensors import SafetensorError, safe_open

from ..files.atomic import atomic_file, lock, save_tensors
from ..files.checks import checked, number, parse_json, text
from .solve import Solution

HEADER_KEY = "hswq_solution"
BIAS = "bias"
_RECORDED = [f.name for f in fields(Solution) if f.name not in ("tensors", "bias")]
PASSING_PREFIX, LOCK_NAME = ".hswq-", "lock"


def key_of(*parts: str) -> str:
    """Folder name for results that depend on ``parts``."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


class Solutions(Mapping[str, Solution]):
    """{layer name: solution}, read from disk at each access.

    Args:
        folder: where the files are.
        files: {layer name: its file} of existing solutions.
    """

    def __init__(self, folder: Path, files: Mapping[str, Path] | None = None) -> None:
        self.folder, self._files = folder, dict(files or {})

    @classmethod
    def resumed(cls, folder: Path, key: str) -> Solutions:
        """Resume from what an earlier run left in ``folder`` under the same key; other keys' results are removed.

        Args:
            folder: the session's work folder.
            key: see ``key_of``.
        """
        own = folder / key
        for other in folder.iterdir() if folder.is_dir() else ():
            if other != own:
                shutil.rmtree(other, ignore_errors=True)
        named = {path: _name_in(path) for path in sorted(own.glob("*.safetensors"))}
        return cls(own, {name: path for path, name in named.items() if name is not None})

    def __getitem__(self, name: str) -> Solution:
        with safe_open(self._files[name], "pt") as file:
            record = json.loads(file.metadata()[HEADER_KEY])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        bias = tensors.pop(BIAS, None)
        return Solution(tensors=tensors, bias=bias, **{key: record[key] for key in _RECORDED})

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def add(self, name: str, solution: Solution) -> None:
        """Save. Raises FileError if the folder cannot be written to."""
        path = self.folder / f"{key_of(name)}.safetensors"
        record = {key: getattr(solution, key) for key in _RECORDED}
        bias = {} if solution.bias is None else {BIAS: solution.bias}
        save_tensors({**solution.tensors, **bias}, path, {HEADER_KEY: json.dumps({"name": name, **record})})
        self._files[name] = path

    def error(self, name: str) -> float:
        """A solution's error, without loading its codes."""
        with safe_open(self._files[name], "pt") as file:
            return float(json.loads(file.metadata()[HEADER_KEY])["error"])

    def numbers(self, stage: str) -> dict[str, float]:
        """What ``save_numbers`` saved; empty if nothing."""
        path = self.folder / f"{stage}.json"
        try:
            record = checked(parse_json(path.read_text(encoding="utf-8")), dict)
            return {name: number(value) for name, value in record.items()}
        except (OSError, ValueError):
            return {}  # none yet

    def save_numbers(self, stage: str, numbers: Mapping[str, float]) -> None:
        """Save a stage's {layer name: number}. Raises FileError if the folder cannot be written to."""
        with atomic_file(self.folder / f"{stage}.json") as temporary:
            temporary.write_text(json.dumps(numbers), encoding="utf-8")


@contextmanager
def passing_solutions(beside: Path) -> Iterator[Solutions]:
    """Temporary solutions in ``beside`` for a conversion short enough to restart from scratch; deleted in any case.

    Leftovers of killed processes are removed when the next one starts; running ones hold a lock, as in ``atomic_file``.
    """
    _clear_abandoned(beside)
    folder, handle, locked = _open_passing(beside)
    try:
        yield Solutions(folder)
    finally:
        # Windows cannot delete files that are still mapped: better a leftover folder than a failed conversion.
        shutil.rmtree(folder, ignore_errors=True)
        if locked:
            os.close(handle)


def _open_passing(beside: Path) -> tuple[Path, int, bool]:
    """A new temporary folder, the handle of its lock, and whether the handle is still open and locked."""
    while True:
        folder = Path(mkdtemp(prefix=PASSING_PREFIX, dir=beside))
        with suppress(FileNotFoundError):  # another process removed it while it was empty
            handle = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT)
            if not lock(handle, wait=True):
                return folder, handle, False
            if os.fstat(handle).st_nlink:
                return folder, handle, True
            os.close(handle)


def _clear_abandoned(beside: Path) -> None:
    for folder in beside.glob(f"{PASSING_PREFIX}*"):
        with suppress(OSError):  # already removed by another process
            if not (folder / LOCK_NAME).exists():
                folder.rmdir()  # only if empty: its process was killed before locking
                continue
            handle = os.open(folder / LOCK_NAME, os.O_RDWR)
            if lock(handle):
                shutil.rmtree(folder, ignore_errors=True)
                os.close(handle)


def _name_in(path: Path) -> str | None:
    """Name of the layer in a file; None if unreadable, and the file is deleted."""
    try:
        with safe_open(path, "pt") as file:
            return text(checked(parse_json(file.metadata()[HEADER_KEY]), dict)["name"])
    except (SafetensorError, OSError, LookupError, TypeError, ValueError):
        path.unlink(missing_ok=True)
        return None
