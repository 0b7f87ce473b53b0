"""The nodes as a real ComfyUI describes them to its page: everything has a tooltip, in every language."""

from __future__ import annotations

import urllib.request

import pytest
from make import locales

pytestmark = pytest.mark.comfy

# Most widgets shown at once: any more are folded away.
MOST_WIDGETS = 4
WIDGETS = ("STRING", "INT", "FLOAT", "BOOLEAN", "COMBO")


@pytest.fixture(scope="module")
def nodes(server):
    found = locales.our_nodes(server.client.object_info())
    assert len(found) >= 5
    return found


def inputs(info):
    """(name, type, options) of a node's inputs."""
    for group in ("required", "optional"):
        for name, (kind, *options) in info["input"].get(group, {}).items():
            yield name, kind, (options or [{}])[0]


@pytest.mark.compat
def test_every_input_and_output_has_a_tooltip(nodes):
    bare = [f"{node}.{name}" for node, info in nodes.items() for name, _, given in inputs(info) if not given["tooltip"]]
    for node, info in nodes.items():
        bare += [
            f"{node} {name}"
            for name, text in zip(info["output_name"], info["output_tooltips"], strict=True)
            if not text
        ]
    assert bare == []
    assert all(info["description"] and info["display_name"].startswith("HSWQ ") for info in nodes.values())


@pytest.mark.compat
def test_english_is_what_the_schemas_say(nodes):
    assert locales.read("en") == {node: locales.english(info) for node, info in nodes.items()}


@pytest.mark.parametrize("language", locales.LANGUAGES)
def test_translations_name_what_there_is_and_nothing_else(nodes, language):
    entries = locales.read(language)
    for node, info in nodes.items():
        entry = entries[node]
        assert list(entry["inputs"]) == [name for name, *_ in inputs(info)]
        assert list(entry["outputs"]) == [str(i) for i in range(len(info["output_name"]))]


@pytest.mark.compat
def test_few_widgets_stand_in_the_way(nodes):
    for node, info in nodes.items():
        shown = [
            name
            for name, kind, given in inputs(info)
            if (isinstance(kind, list) or kind in WIDGETS) and not given.get("advanced") and not given.get("forceInput")
        ]
        assert len(shown) <= MOST_WIDGETS, f"{node}: {shown}"


@pytest.mark.compat
def test_a_widget_has_a_default_except_where_a_file_is_chosen(nodes):
    for node, info in nodes.items():
        for name, kind, given in inputs(info):
            if kind in WIDGETS and not given.get("forceInput"):
                assert "default" in given or given.get("options") is not None, f"{node}.{name}"


@pytest.mark.compat
def test_the_server_hands_out_our_translations(server):
    handed = server.client.get("/i18n")
    for language in locales.LANGUAGES:
        ours = locales.read(language)
        assert {node: handed[language]["nodeDefs"][node] for node in ours} == ours


@pytest.mark.compat
def test_the_server_hands_out_help(server, nodes):
    for node, info in nodes.items():
        pack = info["python_module"].split(".")[1]
        for page in (f"{node}.md", *(f"{node}/{language}.md" for language in locales.LANGUAGES)):
            url = f"{server.url}/extensions/{pack}/docs/{page}"
            with urllib.request.urlopen(url, timeout=30) as reply:  # noqa: S310 - our own
                assert "text/html" not in reply.headers["content-type"]  # the page would take that for "no help"
                assert reply.read() == (locales.DOCS / page).read_bytes()
