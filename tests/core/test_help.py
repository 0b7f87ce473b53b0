"""What the page tells users: help pages and translations, complete and without dead entries. No ComfyUI."""

from __future__ import annotations

import ast
import json
import re

import pytest
from rig.pack import ROOT

LANGUAGES = ("en", "ja", "zh")
DOCS, LOCALES = ROOT / "web" / "docs", ROOT / "locales"
MOST_LINES = 60  # what one side panel shows without much scrolling
# vue-i18n reads these as syntax, and warns of what looks like HTML.
SYNTAX = re.compile(r"[{}@|]|<\w")
KANA, HAN = re.compile(r"[\u3040-\u30ff]"), re.compile(r"[\u4e00-\u9fff]")


def node_ids() -> list[str]:
    """The names in NODES of nodes/__init__.py; each class is called as its node."""
    tree = ast.parse((ROOT / "nodes" / "__init__.py").read_text(encoding="utf-8"))
    (nodes,) = [n for n in tree.body if isinstance(n, ast.AnnAssign) and ast.unparse(n.target) == "NODES"]
    return [ast.unparse(entry) for entry in nodes.value.elts]


NODES = node_ids()
PAGES = [(node, language) for node in NODES for language in LANGUAGES]


def page(node: str, language: str) -> str:
    return (DOCS / node / f"{language}.md").read_text(encoding="utf-8")


def locale(language: str) -> dict[str, dict]:
    return json.loads((LOCALES / language / "nodeDefs.json").read_text(encoding="utf-8"))


def texts(value) -> list[str]:
    return [value] if isinstance(value, str) else [text for inner in value.values() for text in texts(inner)]


def test_the_list_of_nodes_is_found():
    assert len(NODES) >= 5
    assert all(node.startswith("HSWQ") for node in NODES)


@pytest.mark.parametrize(("node", "language"), PAGES)
def test_a_node_has_short_help_that_names_every_input_and_output(node, language):
    text = page(node, language)
    assert len(text.splitlines()) <= MOST_LINES
    assert len(re.findall(r"^## ", text, re.MULTILINE)) >= 4
    quoted = set(re.findall(r"`([^`]+)`", text))
    entry = locale(language)[node]
    assert set(entry["inputs"]) <= quoted
    # An output's translated name is for the node, its English one for help.
    assert {output["name"] for output in locale("en")[node]["outputs"].values()} <= quoted


@pytest.mark.parametrize("node", NODES)
def test_a_language_without_help_gets_the_english_one(node):
    assert (DOCS / f"{node}.md").read_bytes() == (DOCS / node / "en.md").read_bytes()


@pytest.mark.parametrize(("node", "language"), PAGES)
def test_links_of_help_lead_somewhere(node, language):
    for target in re.findall(r"\]\(([^)\s]+)", page(node, language)):
        assert target.startswith("https://") or (DOCS / node / target).is_file(), target


@pytest.mark.parametrize("node", NODES)
def test_all_languages_say_the_same_things(node):
    english = page(node, "en")
    headings, entries = len(re.findall(r"^## ", english, re.M)), len(re.findall(r"^- ", english, re.M))
    for language in LANGUAGES:
        text = page(node, language)
        assert len(re.findall(r"^## ", text, re.M)) == headings
        assert len(re.findall(r"^- ", text, re.M)) == entries
        # Messages are quoted as they appear, names of files and values are not translated.
        assert sorted(set(re.findall(r"(?<!\*)\*[^*\n]+\*(?!\*)", text))) == sorted(
            set(re.findall(r"(?<!\*)\*[^*\n]+\*(?!\*)", english))
        )


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_node_is_named_and_described(language):
    for node in NODES:
        entry = locale(language)[node]
        assert set(entry) == {"display_name", "description", "inputs", "outputs"}
        for spec in [*entry["inputs"].values(), *entry["outputs"].values()]:
            assert set(spec) == {"name", "tooltip"}
        assert all(text.strip() for text in texts(entry))


@pytest.mark.parametrize("language", LANGUAGES)
def test_languages_have_the_same_entries(language):
    english = locale("en")
    for node in NODES:
        entry = locale(language)[node]
        assert {key: list(entry[key]) for key in ("inputs", "outputs")} == {
            key: list(english[node][key]) for key in ("inputs", "outputs")
        }


@pytest.mark.parametrize("language", LANGUAGES)
def test_help_and_translations_belong_to_nodes(language):
    assert set(locale(language)) <= set(NODES)
    folders = {path.name for path in DOCS.iterdir() if path.is_dir()}
    fallbacks = {path.stem for path in DOCS.glob("*.md")}
    assert folders == fallbacks == set(NODES)
    for node in NODES:
        assert {path.name for path in (DOCS / node).iterdir()} == {f"{name}.md" for name in LANGUAGES}


@pytest.mark.parametrize("language", LANGUAGES)
def test_translations_hold_nothing_that_the_page_reads_as_syntax(language):
    assert [text for text in texts(locale(language)) if SYNTAX.search(text)] == []


@pytest.mark.parametrize(("language", "script"), [("ja", KANA), ("zh", HAN)])
def test_translations_are_in_their_language(language, script):
    def is_it(text: str) -> bool:
        return bool(script.search(text)) and (language == "ja" or not KANA.search(text))

    for node in NODES:
        entry = locale(language)[node]
        tooltips = [spec["tooltip"] for spec in [*entry["inputs"].values(), *entry["outputs"].values()]]
        assert [text for text in [entry["description"], *tooltips] if not is_it(text)] == []
        paragraphs = [line for line in page(node, language).splitlines() if len(line) > 80]
        assert [line for line in paragraphs if not is_it(line)] == []
