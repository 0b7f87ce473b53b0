"""The rooms of the pack: which there are, which lies above which, and what each module imports."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from rig.pack import ROOT

# Each from the ground up: a floor, a room or a module imports only from those before it, and from itself.
FLOORS = ("hswq_core", "figures", "loader", "nodes")
ROOMS = {
    "hswq_core": (
        "errors",
        "progress",
        "devices",
        "files.pt",
        "files",
        "quant",
        "model",
        "calibration",
        "plan",
        "methods",
        "convert",
        "reports",
        "cli",
        "__main__",
    ),
    "loader": (
        "support",
        "stamp",
        "comfyui",
        "devices",
        "model",
        "sessions",
        "calibration",
        "open",
        "source",
        "job",
        "replay",
        "model_aware",
        "convert",
    ),
}


def imports(path: Path) -> Iterator[str]:
    """Dotted names, from the repository's root, of what a module of the pack imports from it."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = ".".join(parts[: len(parts) - node.level])
            module = f"{base}.{node.module}" if node.module else base
            yield from (f"{module}.{alias.name}" for alias in node.names)


def modules(floor: str) -> list[Path]:
    """Every module of a floor."""
    return sorted((ROOT / floor).rglob("*.py"))


def room_of(dotted: str, floor: str) -> str:
    """The longest room that ``dotted`` is in."""
    inside = dotted.removeprefix(f"{floor}.")
    rooms = [room for room in ROOMS[floor] if inside == room or inside.startswith(f"{room}.")]
    if not rooms:
        raise LookupError(f"{dotted} is in no room of {floor}: give it one in ROOMS")
    return max(rooms, key=len)


def dotted_name(path: Path) -> str:
    """Of a module, from the repository's root."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def edges(floor: str) -> set[tuple[str, str, str]]:
    """(room, room it imports from, module) within a floor."""
    found = set()
    for path in modules(floor):
        name = dotted_name(path)
        if name == floor:
            continue
        for imported in imports(path):
            if imported.startswith(f"{floor}."):
                found.add((room_of(name, floor), room_of(imported, floor), name))
    return found
