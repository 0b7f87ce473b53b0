"""What a long conversion has done so far, on disk: memory holds one layer, and a crash loses only the layer at hand.

Folder ``<session>.work/<key>/``: one safetensors file a rounded layer (the scheme's tensors and ``bias``; the rest in
its metadata) and ``<stage>.json`` for numbers. The key names everything the results depend on; folders of other keys
are of no use any more and are removed.
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
    """A folder name for results that depend on ``parts``."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


class Solutions(Mapping[str, Solution]):
    """{layer name: solution}, read from disk at each access.

    Args:
        folder: of the files.
        files: {layer name: its file} of what is there.
    """

    def __init__(self, folder: Path, files: Mapping[str, Path] | None = None) -> None:
        self.folder, self._files = folder, dict(files or {})

    @classmethod
    def resumed(cls, folder: Path, key: str) -> Solutions:
        """What an earlier run left below ``folder`` under the same key; what other keys have there is removed.

        Args:
            folder: of the session.
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
        """That of a solution, without its codes."""
        with safe_open(self._files[name], "pt") as file:
            return float(json.loads(file.metadata()[HEADER_KEY])["error"])

    def numbers(self, stage: str) -> dict[str, float]:
        """What ``save_numbers`` saved, or nothing."""
        path = self.folder / f"{stage}.json"
        try:
            found = checked(parse_json(path.read_text(encoding="utf-8")), dict)
            return {name: number(value) for name, value in found.items()}
        except (OSError, ValueError):
            return {}  # none yet

    def save_numbers(self, stage: str, numbers: Mapping[str, float]) -> None:
        """{layer name: number} of a stage. Raises FileError if the folder cannot be written to."""
        with atomic_file(self.folder / f"{stage}.json") as temporary:
            temporary.write_text(json.dumps(numbers), encoding="utf-8")


@contextmanager
def passing_solutions(beside: Path) -> Iterator[Solutions]:
    """One for a conversion that is short enough to start anew, in this folder; gone at the end, whatever happens.

    What a killed process left goes when the next one begins: who still works holds a lock, as in ``atomic_file``.
    """
    _clear_abandoned(beside)
    folder, handle, locked = _begun(beside)
    try:
        yield Solutions(folder)
    finally:
        # Windows removes no file that is still mapped: better a folder left behind than a conversion that fails.
        shutil.rmtree(folder, ignore_errors=True)
        if locked:
            os.close(handle)


def _begun(beside: Path) -> tuple[Path, int, bool]:
    """A new passing folder, the handle of its lock, and whether that is open and locked."""
    while True:
        folder = Path(mkdtemp(prefix=PASSING_PREFIX, dir=beside))
        with suppress(FileNotFoundError):  # another process cleared it away while it was empty
            handle = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT)
            if not lock(handle, wait=True):
                return folder, handle, False
            if os.fstat(handle).st_nlink:
                return folder, handle, True
            os.close(handle)


def _clear_abandoned(beside: Path) -> None:
    for folder in beside.glob(f"{PASSING_PREFIX}*"):
        with suppress(OSError):  # another process was faster
            if not (folder / LOCK_NAME).exists():
                folder.rmdir()  # only if it is empty: killed before it had its lock
                continue
            handle = os.open(folder / LOCK_NAME, os.O_RDWR)
            if lock(handle):
                shutil.rmtree(folder, ignore_errors=True)
                os.close(handle)


def _name_in(path: Path) -> str | None:
    """The layer a file is about; None, and the file is gone, if it cannot be read."""
    try:
        with safe_open(path, "pt") as file:
            return text(checked(parse_json(file.metadata()[HEADER_KEY]), dict)["name"])
    except (SafetensorError, OSError, LookupError, TypeError, ValueError):
        path.unlink(missing_ok=True)
        return None
