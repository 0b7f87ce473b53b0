"""The list of saved sessions in the real page, and the status line about what is recorded."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hswq.hswq_core.calibration.observer import LayerStats
from hswq.hswq_core.calibration.session import Session, save_session
from hswq.hswq_core.calibration.states import Sample, State
from hswq.hswq_core.calibration.states_file import save_states, states_path
from hswq.hswq_core.model.fingerprint import Fingerprint, layout_hash
from rig import flow, mouse, prompts

pytestmark = [pytest.mark.comfy, pytest.mark.page]

WIDGETS = {
    "HSWQCalibration": "session",
    "HSWQConverter": "session",
    "HSWQFileConverter": "session",
    "HSWQMergeSessions": "sessions",
}
BUTTON = "Choose session…"
HOSTILE = '<img src=x onerror="window.hacked=1">'
ROW = ".hswq-session"


def layers(count: int) -> dict[str, LayerStats]:
    sums = torch.ones(4, dtype=torch.float64)
    return {f"layer{i}": LayerStats("Linear", (3, 4), 5, 5, 0.0, 1.0, sums, sums, 1.0) for i in range(count)}


def save(folder: Path, name: str, family: str = "SDXL", count: int = 3, calls: int = 5, states: int = 0) -> None:
    made = layers(count)
    layout = layout_hash({key: (stats.kind, stats.shape) for key, stats in made.items()})
    fingerprint = Fingerprint(layout, torch.ones(4 * count))
    when = 1_763_800_000.0 + calls
    save_session(Session(family, fingerprint, made, calls, 2, {20: 1}, when, when), folder / f"{name}.pt")
    if states:
        sample = Sample(states)
        tensors = {"x": torch.ones(1, 4), "sigma": torch.ones(1)}
        sample.add([State(i / states, tensors, {}) for i in range(states)])
        save_states(sample, fingerprint, states_path(folder / f"{name}.pt"))


@pytest.fixture(scope="module")
def folder(server) -> Path:
    folder = server.output / "hswq_stats"
    folder.mkdir(exist_ok=True)
    for number in (1, 2):
        save(folder, f"page_0{number}", calls=10 * number, states=4 * number)
    save(folder, "page_other", family="Flux", count=2)
    (folder / "page_damaged.pt").write_bytes(b"no session")
    if os.name != "nt":  # Windows does not allow such names
        (folder / f"{HOSTILE}.pt").write_bytes(b"no session")
    return folder


@pytest.fixture
def fresh(page, folder):
    """An empty graph; any error that a test causes in the page is reported."""
    del page.errors[:], page.crashes[:], page.failed[:]
    page.js("() => { document.querySelectorAll('dialog').forEach(d => d.close()); app.graph.clear() }")
    yield page
    assert (page.errors, page.crashes, page.failed) == ([], [], [])
    assert page.js("() => window.hacked") is None


def add(page, kind: str, session: str = "page_01") -> int:
    return page.js(
        """([kind, name, value]) => {
            const node = LiteGraph.createNode(kind)
            node.pos = [600 * app.graph.nodes.length, 0]
            app.graph.add(node)
            node.widgets.find(widget => widget.name === name).value = value
            return node.id
        }""",
        [kind, WIDGETS[kind], session],
    )


def value(page, node: int) -> str:
    return page.js(
        "id => app.graph.getNodeById(id).widgets.find(w => w.name === 'session' || w.name === 'sessions').value", node
    )


def press(page, node: int, rows: bool = True) -> Any:
    """Press the node's button with the mouse; returns the dialog once its list is there."""
    dialog = page.page.locator("dialog.hswq-dialog")
    mouse.press(page, lambda: middle(page, node), dialog)
    if rows:
        dialog.locator(ROW).first.wait_for()
    return dialog


def middle(page, node: int) -> list[float]:
    """Centre of the button, which is moved to the middle of the page."""
    return page.js(
        """([id, label]) => {
            const node = app.graph.getNodeById(id), widget = node.widgets.find(widget => widget.name === label)
            app.canvas.centerOnNode(node)
            app.canvas.draw(true, true)
            const middle = [node.pos[0] + node.size[0] / 2, node.pos[1] + widget.y + 10]
            const [x, y] = app.canvas.convertOffsetToCanvas(middle)
            const { left, top } = app.canvas.canvas.getBoundingClientRect()
            return [x + left, y + top]
        }""",
        [node, BUTTON],
    )


def row(dialog, name: str) -> Any:
    return dialog.locator(ROW).filter(has=dialog.page.locator(".hswq-name", has_text=re.compile(f"^{re.escape(name)}")))


@pytest.mark.parametrize("kind", WIDGETS)
def test_every_node_with_a_session_has_the_button_and_the_list(fresh, kind):
    dialog = press(fresh, add(fresh, kind, ""))
    assert row(dialog, "page_01").is_visible()
    fresh.page.keyboard.press("Escape")
    dialog.wait_for(state="detached")


def test_other_nodes_have_none(fresh):
    names = fresh.js("() => LiteGraph.createNode('HSWQLoader').widgets.map(widget => widget.name)")
    assert BUTTON not in names


def test_the_list_says_what_is_in_a_session(fresh):
    dialog = press(fresh, add(fresh, "HSWQCalibration"))
    text = row(dialog, "page_02").inner_text()
    assert "SDXL · 3 layers · 20 calls · 2 images · 8 states · " in text
    assert "2025" in text
    assert "Flux · 2 layers · 5 calls · 2 images · " in row(dialog, "page_other").inner_text()
    assert "states" not in row(dialog, "page_other").inner_text()
    assert row(dialog, "page_01").get_attribute("aria-current") == "true"  # the node's current session
    damaged = row(dialog, "page_damaged")
    assert "unreadable" in damaged.inner_text()
    assert damaged.is_disabled()


@pytest.mark.skipif(os.name == "nt", reason="no such file names")
def test_a_hostile_file_name_is_text(fresh):
    dialog = press(fresh, add(fresh, "HSWQCalibration"))
    hostile = row(dialog, HOSTILE)
    assert HOSTILE in hostile.inner_text()
    assert "its name cannot be used" in hostile.inner_text()
    assert hostile.is_disabled()
    assert dialog.locator("img").count() == 0


def test_choosing_sets_the_widget_of_that_node_alone(fresh):
    first, second = add(fresh, "HSWQCalibration"), add(fresh, "HSWQConverter")
    dialog = press(fresh, first)
    row(dialog, "page_02").click()
    dialog.wait_for(state="detached")
    assert (value(fresh, first), value(fresh, second)) == ("page_02", "page_01")


def test_choosing_for_a_merge_adds_lines_of_one_model(fresh):
    node = add(fresh, "HSWQMergeSessions", "")
    dialog = press(fresh, node)
    row(dialog, "page_02").click()
    row(dialog, "page_02").filter(has_text="in the list").wait_for()
    assert row(dialog, "page_02").is_disabled()
    assert "of another model" in row(dialog, "page_other").inner_text()
    assert row(dialog, "page_other").is_disabled()
    row(dialog, "page_01").click()
    dialog.get_by_text("Done").click()
    dialog.wait_for(state="detached")
    assert value(fresh, node) == "page_02\npage_01"


def test_a_new_session_is_begun_after_confirmation_and_the_converter_follows(fresh, folder):
    before = {path: path.read_bytes() for path in folder.iterdir()}
    calibration, converter = add(fresh, "HSWQCalibration"), add(fresh, "HSWQConverter")
    files, other = add(fresh, "HSWQFileConverter"), add(fresh, "HSWQConverter", "page_other")
    dialog = press(fresh, calibration)
    dialog.get_by_text("Start a new session…").click()
    assert "page_01 stays as it is; new statistics go to page_03." in dialog.inner_text()
    assert "Changes with it: HSWQ Converter." in dialog.inner_text()
    assert value(fresh, calibration) == "page_01"
    dialog.get_by_text("Start page_03").click()
    dialog.wait_for(state="detached")
    assert [value(fresh, node) for node in (calibration, converter)] == ["page_03"] * 2
    assert [value(fresh, node) for node in (files, other)] == ["page_01", "page_other"]
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    fresh.page.keyboard.press("Control+z")
    fresh.page.wait_for_function(
        "ids => ids.every(id => app.graph.getNodeById(id)?.widgets[0].value === 'page_01')",
        arg=[calibration, converter],
    )


def test_a_new_session_that_is_declined_changes_nothing(fresh):
    node = add(fresh, "HSWQCalibration", "page_other")
    for decline in (lambda dialog: dialog.get_by_text("Cancel").click(), lambda _: fresh.page.keyboard.press("Escape")):
        dialog = press(fresh, node)
        dialog.get_by_text("Start a new session…").click()
        assert "new statistics go to page_other_02." in dialog.inner_text()
        decline(dialog)
        dialog.wait_for(state="detached")
        assert value(fresh, node) == "page_other"


def test_a_merge_begins_no_session(fresh):
    dialog = press(fresh, add(fresh, "HSWQMergeSessions", ""))
    assert dialog.get_by_text("Start a new session…").count() == 0


def test_a_linked_input_says_so(fresh):
    node = add(fresh, "HSWQConverter")
    fresh.js(
        """id => {
            const merge = LiteGraph.createNode('HSWQMergeSessions'), node = app.graph.getNodeById(id)
            app.graph.add(merge)
            merge.connect(0, node, node.inputs.findIndex(input => input.name === 'session'))
        }""",
        node,
    )
    assert "what comes through the link counts" in press(fresh, node).inner_text()


def test_shortcuts_of_the_page_do_not_reach_through_the_dialog(fresh):
    node = add(fresh, "HSWQCalibration")
    fresh.js("id => app.canvas.selectNode(app.graph.getNodeById(id))", node)
    press(fresh, node)
    fresh.page.keyboard.press("Delete")
    fresh.page.keyboard.press("Control+b")
    assert fresh.js("id => app.graph.getNodeById(id)?.mode", node) == 0


@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_a_workflow_keeps_its_values_and_has_none_of_the_button(fresh, family):
    shipped = flow.shipped(family, flow.CALIBRATE)
    fresh.load(shipped)
    saved = {node["id"]: node for node in fresh.workflow()["nodes"]}
    ours = [node for node in shipped["nodes"] if node["type"] in WIDGETS]
    assert ours
    for node in ours:
        assert saved[node["id"]]["widgets_values"] == node["widgets_values"]
        assert [i["name"] for i in saved[node["id"]]["inputs"]] == [i["name"] for i in node["inputs"]]
        assert fresh.js("([id, name]) => app.graph.getNodeById(id).widgets.at(-1).name === name", [node["id"], BUTTON])
    fresh.load(fresh.workflow())
    again = {node["id"]: node for node in fresh.workflow()["nodes"]}
    assert all(again[node["id"]]["widgets_values"] == node["widgets_values"] for node in ours)
    assert all(BUTTON not in node["inputs"] for node in fresh.prompt().values())


def test_the_button_works_where_the_page_draws_nodes_itself(fresh):
    """With Nodes 2.0, if the page has it."""
    switch = "on => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)"
    if not fresh.js("() => 'Comfy.VueNodes.Enabled' in app.ui.settings.settingsLookup"):
        pytest.skip("this page has no Nodes 2.0")
    fresh.js(switch, True)
    try:
        node = add(fresh, "HSWQCalibration")
        fresh.js("id => app.canvas.centerOnNode(app.graph.getNodeById(id))", node)
        fresh.page.get_by_role("button", name=BUTTON).or_(fresh.page.locator("button", has_text=BUTTON)).first.click()
        dialog = fresh.page.locator("dialog.hswq-dialog")
        row(dialog, "page_02").click()
        dialog.wait_for(state="detached")
        assert value(fresh, node) == "page_02"
        shown = fresh.page.locator("[data-node-id] input[type=text]")  # not those of an open panel
        assert shown.evaluate_all("all => all.map(e => e.value)").count("page_02") == 1
    finally:
        fresh.js(switch, False)


def test_the_node_shows_what_it_records(fresh, server, models):
    prompt = prompts.flux(models.flux(), models.taef(), steps=4, seed=31)
    calibration = prompts.node("HSWQCalibration", model=["model", 0], session="page_line", save_every=50, states=4)
    slow = prompts.node("RigTrouble", model=["model", 0], mode="slow", at=1, seconds=1.5)
    prompt = prompts.insert(prompts.insert(prompt, "calibration", calibration), "trouble", slow)
    fresh.from_api(prompt)
    shown = """pattern => app.graph.nodes.find(node => node.type === 'HSWQCalibration')
        .widgets.some(widget => new RegExp(pattern).test(String(widget.value)))"""
    queued = fresh.queue()
    fresh.page.wait_for_function(shown, arg="^Flux · 26 layers · [123] calls · unsaved$")
    server.client.wait(queued).check()
    fresh.page.wait_for_function(shown, arg="^Flux · 26 layers · 4 calls · saved [0-9]{2}:[0-9]{2}$")
    fresh.page.get_by_text(re.compile(r"^Flux · 26 layers · 4 calls · saved \d\d:\d\d$")).wait_for()
