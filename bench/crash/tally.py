"""Counts of what kills did."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Tally:
    """Of one kind of work.

    Attributes:
        name: of the work.
        kills: processes killed at work.
        in_writes: of these with a temporary file half written.
        finished: processes that were done before their moment came.
        lost: most model calls that a kill cost.
        lost_bound: as many it may.
        damage: what should not be, one line each: files, sessions, next runs.
        left: temporary files that the next run did not clear away.
        files: whole files seen under their final names.
        resumed: runs that went on from work found on disk.
        seconds: an undisturbed run takes.
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
        """Nothing damaged, nothing left, no more lost than allowed."""
        return not self.damage and not self.left and self.lost <= self.lost_bound

    def row(self) -> str:
        """Cells of a table, see ``HEAD``."""
        lost = f"{self.lost} of {self.lost_bound}" if self.lost_bound else "-"
        cells = (self.name, f"{self.seconds:.1f}", self.kills, self.in_writes, len(self.damage), lost, self.left)
        return f"| {' | '.join(map(str, (*cells, self.files, self.resumed)))} |"


HEAD = (
    "| killed at | s undisturbed | kills | of these in a write | damaged | most calls lost | temporary files after the "
    "next run | whole files met | went on from work on disk |\n|---|--:|--:|--:|--:|--:|--:|--:|--:|"
)
