"""The page shows our names, tooltips and help, in the user's language."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from rig import flow
from rig.pack import ROOT

pytestmark = [pytest.mark.comfy, pytest.mark.page]

LANGUAGES = ("en", "ja", "zh")
MOST_MS = 30_000
# A freshly opened page misses the first selections: select again until the panel shows the text.
SHOWN = """text => {
    const panel = document.querySelector('.node-help-content')
    if (panel?.innerText.replace(/\\s+/g, ' ').includes(text)) return true
    const info = document.querySelector('[data-testid=info-button]')
    if (info && !panel) info.click()
    else if (!info) {
        app.canvas.deselectAll()
        app.canvas.selectNode(app.graph.nodes[0])
    }
}"""
ADVANCED = ["keep_ratio", "filename_prefix", "target_mb", "scale_per", "fast_matmul"]


@pytest.fixture
def setting(page) -> Iterator:
    """(name, value) sets one of the page's settings; all are restored at the end."""
    before = {}

    def change(name, value):
        before.setdefault(name, page.js("name => app.extensionManager.setting.get(name)", name))
        page.js("([name, value]) => app.extensionManager.setting.set(name, value)", [name, value])

    yield change
    for name, value in before.items():
        page.js("([name, value]) => app.extensionManager.setting.set(name, value)", [name, value])
    page.reload()


def locale(language: str) -> dict:
    return json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))


def beginning(node: str, language: str) -> str:
    """The beginning of the help, as the page renders it."""
    text = (ROOT / "web" / "docs" / node / f"{language}.md").read_text(encoding="utf-8")
    return text.splitlines()[0].replace("`", "")


def require_help(page, node: str, text: str) -> None:
    """Add a node, select it, press the i in its toolbox; the panel must show ``text``."""
    page.js(
        """node => {
            app.graph.clear()
            const added = LiteGraph.createNode(node)
            added.pos = [400, 300]
            app.canvas.ds.reset()
            app.graph.add(added)
        }""",
        node,
    )
    page.js("() => app.canvas.selectNode(app.graph.nodes[0])")
    page.page.wait_for_function(SHOWN, arg=text, polling=500, timeout=MOST_MS)


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_help_panel_opens_in_the_users_language(page, setting, language):
    setting("Comfy.Locale", language)
    page.reload()
    for node in locale(language):
        if page.has_node(node):
            require_help(page, node, beginning(node, language))
    assert page.crashes == []


def test_a_language_without_help_gets_the_english_one(page, setting):
    setting("Comfy.Locale", "fr")
    page.reload()
    require_help(page, "HSWQLoader", beginning("HSWQLoader", "en"))
    # The page requests fr.md first, which does not exist.
    page.failed[:] = [line for line in page.failed if not line.endswith("/fr.md")]
    assert (page.failed, page.crashes) == ([], [])


@pytest.mark.parametrize("language", LANGUAGES)
def test_names_are_in_the_users_language(page, setting, language):
    setting("Comfy.Locale", language)
    page.reload()
    for node, entry in locale(language).items():
        if not page.has_node(node):
            continue
        shown = page.js(
            """node => {
                const made = LiteGraph.createNode(node)
                const names = Object.fromEntries(made.inputs.map(input => [input.name, input.localized_name]))
                for (const widget of made.widgets ?? []) names[widget.name] = widget.label
                return {title: made.title, names}
            }""",
            node,
        )
        assert shown["title"] == entry["display_name"]
        expected = {name: spec["name"] for name, spec in entry["inputs"].items()}
        assert {name: shown["names"].get(name) for name in expected} == expected


def test_advanced_widgets_are_folded_until_asked_for(page, setting):
    """Applies where the page draws the nodes itself; the old canvas still shows all widgets."""
    setting("Comfy.VueNodes.Enabled", True)
    page.reload()
    page.load(flow.shipped("sd15", flow.CALIBRATE))
    page.fit()
    id_ = page.js("() => String(app.graph.nodes.find(node => node.type === 'HSWQConverter').id)")
    node = page.page.locator(f"[data-node-id='{id_}']")
    node.wait_for(timeout=MOST_MS)
    before = page.prompt()
    assert node.get_by_text("extra_percent", exact=True).is_visible()
    assert [name for name in ADVANCED if node.get_by_text(name, exact=True).count()] == []
    node.get_by_test_id("advanced-inputs-button").click(timeout=MOST_MS)
    node.get_by_text("keep_ratio", exact=True).wait_for(timeout=MOST_MS)
    assert all(node.get_by_text(name, exact=True).count() == 1 for name in ADVANCED)
    assert page.prompt() == before
