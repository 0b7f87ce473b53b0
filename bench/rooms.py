"""How the rooms of the pack hang together, as a table: `nox -s bench -- rooms.py`.

One import is one module that imports from one room, however many names.
"""

from __future__ import annotations

from collections import Counter

from rig.rooms import ROOMS, dotted_name, edges, modules, room_of


def main() -> None:
    """Print a table for each floor that has rooms."""
    for floor in ROOMS:
        print(f"\n{table(floor)}")


def table(floor: str) -> str:
    """Markdown: files of each room, its imports from other rooms and from itself, the rooms it imports from."""
    found = edges(floor)
    files = Counter(room_of(dotted_name(path), floor) for path in modules(floor) if dotted_name(path) != floor)
    lines = [
        f"| room of {floor} | files | imports from other rooms | within | rooms it imports from |",
        "|---|--:|--:|--:|---|",
    ]
    for room in ROOMS[floor]:
        targets = [to for one, to, _ in found if one == room]
        others = sorted({to for to in targets if to != room}, key=ROOMS[floor].index)
        counts = (files[room], len(targets) - targets.count(room), targets.count(room))
        lines.append(f"| {room} | {' | '.join(map(str, counts))} | {', '.join(others)} |")
    arrows = len({(room, to) for room, to, _ in found if room != to})
    return "\n".join([*lines, f"\n{sum(files.values())} files, {len(found)} imports, {arrows} arrows between rooms"])


if __name__ == "__main__":
    main()
