"""Reads every attack, and every input that fuzzing ever found, under a memory limit; prints one line of JSON for each.

    cd bench && python -m fuzzing.replay

{"name", "result": the error, "opened", or what went wrong, "sound", "seconds" of CPU time, "megabytes" more}
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from rig import pack

pack.alias()

from .file_attacks import CHECKPOINTS, STATES  # noqa: E402
from .limits import MEMORY, limit, resident  # noqa: E402
from .session_attacks import SESSIONS  # noqa: E402
from .targets import TARGETS, read_checkpoint, read_session, read_states, refusal  # noqa: E402

FOUND = pack.ROOT / "tests" / "data" / "hostile"
READERS = (
    ("session", SESSIONS, read_session, ".pt"),
    ("checkpoint", CHECKPOINTS, read_checkpoint, ".safetensors"),
    ("states", STATES, read_states, ".states.safetensors"),
)


def main() -> None:
    """Make each file, then read it, with memory limited only while reading."""
    with TemporaryDirectory() as name:
        for what, run in attacks(Path(name)):
            began, before = time.thread_time(), resident()
            try:
                with limit(MEMORY):
                    result, sound = run(), True
            except Exception as error:  # noqa: BLE001 - the line reports any error
                result, sound = f"{type(error).__name__}: {error}"[:500], False
            seconds, size = time.thread_time() - began, resident() - before
            line = {"name": what, "result": result, "sound": sound, "seconds": round(seconds, 3)}
            print(json.dumps({**line, "megabytes": round(size / 1e6)}), flush=True)


def attacks(folder: Path) -> Iterator[tuple[str, Callable[[], str]]]:
    """(name, function that reads it and reports the outcome)."""
    for kind, rows, read, suffix in READERS:
        for name, make in rows.items():
            path = folder / f"hostile{suffix}"
            make(path)
            yield f"{kind}: {name}", lambda path=path, read=read: outcome(path, read)
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for file in sorted(FOUND.glob("*-*")):
        target = TARGETS[file.name.partition("-")[0]]
        yield (
            f"found: {file.name}",
            lambda target=target, file=file: target.run(file.read_bytes(), folder) or "no error",
        )


def outcome(path: Path, read: Callable[[Path], object]) -> str:
    """The refusal, the problems reported for the file, or "opened"."""
    said: list[str] = []

    def heard(file: Path) -> None:
        found = read(file)
        said.extend(found if read is read_checkpoint else ())  # type: ignore[arg-type]

    return refusal(path, heard) or "; ".join(said) or "opened"


if __name__ == "__main__":
    main()
