"""Files on disk, read as if a stranger had written them and written whole or not at all."""
