"""Counts of what the kills did."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Tally:
    """Counts for one kind of work.

    Attributes:
        name: name of the work.
        kills: processes killed while working.
        in_writes: those of them that had a half-written temporary file.
        finished: processes that finished before their moment came.
        lost: most model calls that a kill cost.
        lost_bound: most calls that a kill may cost.
        damage: problems, one line each: files, sessions, next runs.
        left: temporary files that the next run did not remove.
        files: complete files seen under their final names.
        resumed: runs that went on from work found on disk.
        seconds: duration of an undisturbed run.
    """

    name: str
    kills: int = 0
    in_writes: int = 0
    finished: int = 0
    lost: int = 0
    lost_bound: int = 0
    damage: list[str] = field(default_factory=list)
    left: int = 0
    files: int = 0
    resumed: int = 0
    seconds: float = 0.0

    @property
    def sound(self) -> bool:
        """Whether nothing is damaged, nothing is left behind, and no more is lost than allowed."""
        return not self.damage and not self.left and self.lost <= self.lost_bound

    def row(self) -> str:
        """Table cells, see ``HEAD``."""
        lost = f"{self.lost} of {self.lost_bound}" if self.lost_bound else "-"
        cells = (self.name, f"{self.seconds:.1f}", self.kills, self.in_writes, len(self.damage), lost, self.left)
        return f"| {' | '.join(map(str, (*cells, self.files, self.resumed)))} |"


HEAD = (
    "| killed at | s undisturbed | kills | of these in a write | damaged | most calls lost | temporary files after the "
    "next run | whole files met | went on from work on disk |\n|---|--:|--:|--:|--:|--:|--:|--:|--:|"
)
