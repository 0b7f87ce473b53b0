"""Which file a name stood for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..hswq_core.errors import FileError


@dataclass(frozen=True)
class Stamp:
    """What tells a file from another that has taken its name: bytes, time of change, inode."""

    size: int
    changed: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> Stamp:
        """Stamp of the file that has this name now.

        Raises:
            FileError: there is none.
        """
        try:
            found = path.stat()
        except OSError as error:
            raise FileError(
                f"File {path.name}",
                got=f"{type(error).__name__}: {error.strerror}",
                expected="a file that can be read",
                remedy="Put it back, or press R and choose another one in the loader.",
            ) from error
        return cls(found.st_size, found.st_mtime_ns, found.st_ino)

    def require(self, path: Path) -> None:
        """Raise FileError if another file has taken the name ``path``, or none has it."""
        if Stamp.of(path) != self:
            raise FileError(
                f"File {path.name}",
                got="another file of that name than the one the model was opened from",
                expected="the same file, since ComfyUI needs the model once more",
                remedy="Queue again: the loader opens the new file.",
            )
