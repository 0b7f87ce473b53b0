"""Imports run downward: within the pack from floor to floor, within hswq_core and loader from room to room."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from rig.pack import ROOT
from rig.rooms import FLOORS, ROOMS, dotted_name, edges, imports, modules

# What the formulas of quantization may know of the rest.
NUMBERS_ONLY = ("errors", "devices", "quant")


@pytest.mark.parametrize("floor", FLOORS)
def test_no_module_imports_from_a_floor_above(floor):
    above = FLOORS[FLOORS.index(floor) + 1 :]
    wrong = [(path.name, name) for path in modules(floor) for name in imports(path) if name.split(".")[0] in above]
    assert not wrong


@pytest.mark.parametrize("floor", ROOMS)
def test_no_room_imports_from_one_above(floor):
    order = {room: i for i, room in enumerate(ROOMS[floor])}
    wrong = sorted((module, to) for room, to, module in edges(floor) if order[to] > order[room])
    assert not wrong


@pytest.mark.parametrize("floor", ROOMS)
def test_every_room_is_there_and_says_what_lives_in_it(floor):
    for room in ROOMS[floor]:
        place = ROOT / floor / room.replace(".", "/")
        if place.with_suffix(".py").is_file():
            continue
        text = ast.get_docstring(ast.parse((place / "__init__.py").read_text(encoding="utf-8")))
        assert text, room
        assert len(text.splitlines()) <= 2, room


def test_a_room_is_entered_by_its_modules():
    """No ``__init__`` is a second door to names that have a home."""
    for floor in ROOMS:
        for path in (ROOT / floor).rglob("__init__.py"):
            assert not list(imports(path)), path


def test_quant_holds_numbers_only():
    found = {(module, to) for room, to, module in edges("hswq_core") if room == "quant"}
    assert not {(module, to) for module, to in found if to not in NUMBERS_ONLY}


@pytest.mark.parametrize("floor", FLOORS)
def test_no_modules_import_each_other_in_a_circle(floor):
    names = {dotted_name(path): path for path in modules(floor)}
    imported = {name: {home(one, names) for one in imports(path)} & names.keys() for name, path in names.items()}
    done: set[str] = set()
    while len(done) < len(names):
        free = {name for name in names.keys() - done if imported[name] - {name} <= done}
        assert free, f"a circle among {sorted(names.keys() - done)}"
        done |= free


def home(imported: str, names: dict[str, Path]) -> str:
    """The module that an imported name stands in; the name may be a module itself."""
    return imported if imported in names else imported.rpartition(".")[0]
