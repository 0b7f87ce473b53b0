"""Kill a conversion, check the files, and convert again: the bytes must be those of an undisturbed run."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crash.killing import Moment, half_written, run, temporary_files
from crash.tally import Tally

FORMAT = "v2"
WAYS = HSWQ, AWARE, LEARNED = "converting, hswq", "converting, model_aware", "file to file, learned"


@dataclass
class Converting:
    """One way to convert.

    Attributes:
        name: name in the tally.
        work: converts into ``folder``/diffusion_models.
        folder: ComfyUI's output folder.
        writes: number of files that a run writes.
        share: share of the kills.
        expected: {file name: bytes} of an undisturbed run.
    """

    name: str
    work: Callable[[], object]
    folder: Path
    writes: int
    share: float
    expected: dict[str, bytes] = field(default_factory=dict)

    @property
    def target(self) -> Path:
        """The folder where loaders look."""
        return self.folder / "diffusion_models"

    @property
    def stats(self) -> Path:
        """The folder of sessions and of the work that conversions resume from."""
        return self.folder / "hswq_stats"

    def killed(self, kills: int, rng: random.Random) -> Tally:
        """Kill ``kills`` processes; each time the next run must finish."""
        tally, log = Tally(self.name), self.folder.parent / "child.log"
        tally.seconds = run(self.work, log).seconds
        self.expected = {path.name: path.read_bytes() for path in sorted(self.target.iterdir())}
        if len(self.expected) != 2:
            raise SystemExit(f"{self.name}: {log.read_text()}")
        sessions = self._sessions()
        while tally.kills < kills:
            self._emptied()
            old = temporary_files([self.folder])
            end = run(self.work, log, Moment.drawn(rng, tally.seconds, self.writes), [self.folder])
            tally.kills += end.status == "killed"
            tally.in_writes += end.status == "killed" and bool(half_written([self.folder]) - old)
            tally.finished += end.status == "done"
            tally.damage += self.findings(tally)
            tally.resumed += bool(list(self.stats.glob("*.work/*/*.safetensors")))
            self._emptied()
            end = run(self.work, log)
            if end.status != "done" or {p.name for p in self.target.glob("*.*")} < set(self.expected):
                tally.damage.append(f"next run: {end.status}, {sorted(p.name for p in self.target.iterdir())}")
            tally.damage += self.findings(tally)
            tally.left += len(temporary_files([self.folder])) + len(list(self.stats.glob("*.work")))
            if self._sessions() != sessions:
                tally.damage.append("the session has changed")
        self._emptied()
        return tally

    def findings(self, tally: Tally) -> Iterator[str]:
        """Problems in files under final names, one line each."""
        from hswq.hswq_core.errors import HSWQError
        from hswq.hswq_core.files.checkpoint import FileSource
        from hswq.hswq_core.reports.inspect import findings

        temporary = temporary_files([self.folder])
        for path in sorted(set(self.target.iterdir()) - temporary):
            if path.read_bytes() != self.expected.get(path.name):
                yield f"{path.name}: not what an undisturbed run writes"
        for path in sorted(self.target.glob("*.safetensors")):
            tally.files += 1
            try:
                yield from findings(path)
                file = FileSource(path)
                for key, info in file.entries.items():
                    tensor = file.read(key)
                    if (tensor.dtype, tuple(tensor.shape)) != (info.dtype, info.shape):
                        yield f"{path.name}: {key}"
            except HSWQError as error:
                yield str(error)
        yield from self._work_findings()

    def _work_findings(self) -> Iterator[str]:
        for path in self.stats.glob("*.work/*/*"):
            if not _readable(path):
                yield f"{path.name}: unreadable"

    def _emptied(self) -> None:
        """Remove finished files, so that the next conversion's name is free."""
        for name in self.expected:
            (self.target / name).unlink(missing_ok=True)

    def _sessions(self) -> dict[str, bytes]:
        return {p.name: p.read_bytes() for p in self.stats.iterdir() if p.suffix in (".pt", ".safetensors")}


def _readable(path: Path) -> bool:
    """Whether a work file is complete."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            load_file(path)
        elif path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
    except (SafetensorError, ValueError):
        return False
    return True


def ways(model: Any, file: Path, folder: Path, session: str) -> list[Converting]:
    """Each method of the Converter node, and file to file.

    Args:
        model: a calibrated ModelPatcher.
        file: the model's file, listed among the diffusion models.
        folder: ComfyUI's output folder.
        session: the session's name.
    """
    from hswq.nodes.converter import HSWQConverter
    from hswq.nodes.file_converter import HSWQFileConverter

    def node(kind: Any, *inputs: Any) -> Callable[[], object]:
        return lambda: kind.PREPARE_CLASS_CLONE(None).execute(*inputs)

    listed = f"diffusion_models/{file.name}"
    hswq, aware = (node(HSWQConverter, model, session, FORMAT, method, 3.0, 0.25) for method in ("hswq", "model_aware"))
    learned = node(HSWQFileConverter, listed, FORMAT, "learned", "auto")
    layers = len(model_layers(model))
    return [
        Converting(HSWQ, hswq, folder, 2, 0.4),
        Converting(AWARE, aware, folder, layers + 4, 0.4),
        Converting(LEARNED, learned, folder, layers // 2, 0.2),
    ]


def model_layers(model: Any) -> dict[str, Any]:
    """Every Linear and Conv2d."""
    from hswq.loader.model import layer_modules

    return dict(layer_modules(model.model.diffusion_model))


def listed(file: Path) -> Path:
    """The file, at a place where ComfyUI lists it."""
    import folder_paths

    place = Path(folder_paths.get_folder_paths("diffusion_models")[0])
    place.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copy(file, place / "model.safetensors"))
