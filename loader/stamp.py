"""Whether a name still refers to the same file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..hswq_core.errors import FileError


@dataclass(frozen=True)
class Stamp:
    """Tells a file from another that has replaced it: size, modification time, inode."""

    size: int
    changed: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> Stamp:
        """Stamp of the file that now has this name.

        Raises:
            FileError: there is none.
        """
        try:
            status = path.stat()
        except OSError as error:
            raise FileError(
                f"File {path.name}",
                got=f"{type(error).__name__}: {error.strerror}",
                expected="a file that can be read",
                remedy="Put it back, or press R and choose another one in the loader.",
            ) from error
        return cls(status.st_size, status.st_mtime_ns, status.st_ino)

    def require(self, path: Path) -> None:
        """Raise FileError if the file at ``path`` was replaced or is gone."""
        if Stamp.of(path) != self:
            raise FileError(
                f"File {path.name}",
                got="another file of that name than the one the model was opened from",
                expected="the same file, since ComfyUI needs the model once more",
                remedy="Queue again: the loader opens the new file.",
            )
