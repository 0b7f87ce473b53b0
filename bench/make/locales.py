"""Rewrites `locales/en/nodeDefs.json` and `web/docs/<node>.md` from the nodes as a real ComfyUI describes them.

    python -m nox -s bench -- make/locales.py

English texts live in the schemas; the other languages are written by hand. If any entries are missing there, they are
listed and the exit code is 1. Without help in the user's language the page shows `web/docs/<node>.md`, a copy of en.md.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # this package's parent, not the package
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from rig.base import PACK_NAME
from rig.pack import ROOT
from rig.server import ComfyServer

LOCALES, DOCS = ROOT / "locales", ROOT / "web" / "docs"
LANGUAGES = ("en", "ja", "zh")


def our_nodes(object_info: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """{node id: its entry in /object_info}, for our pack's nodes."""
    return {key: info for key, info in object_info.items() if info["python_module"] == f"custom_nodes.{PACK_NAME}"}


def english(info: dict[str, Any]) -> dict[str, Any]:
    """A node's entry for nodeDefs.json, with the texts of its schema."""
    specs = {name: spec for group in ("required", "optional") for name, spec in info["input"].get(group, {}).items()}
    inputs = {name: {"name": name, "tooltip": spec[1].get("tooltip", "")} for name, spec in specs.items()}
    outputs = {
        str(i): {"name": name, "tooltip": tooltip or ""}
        for i, (name, tooltip) in enumerate(zip(info["output_name"], info["output_tooltips"], strict=True))
    }
    return {
        "display_name": info["display_name"],
        "description": info["description"],
        "inputs": inputs,
        "outputs": outputs,
    }


def texts(value: Any, place: str = "") -> dict[str, str]:
    """{place: text} for everything in a locale file."""
    if isinstance(value, str):
        return {place: value}
    return {k: v for key, inner in value.items() for k, v in texts(inner, f"{place}.{key}").items()}


def read(language: str) -> dict[str, Any]:
    """A language's nodeDefs.json."""
    return dict(json.loads((LOCALES / language / "nodeDefs.json").read_text(encoding="utf-8")))


def main() -> None:
    """Write both, and list what is missing."""
    with ComfyServer() as server:
        nodes = our_nodes(server.client.object_info())
    made = {key: english(info) for key, info in nodes.items()}
    path = LOCALES / "en" / "nodeDefs.json"
    path.write_text(json.dumps(made, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    print(path.relative_to(ROOT))
    for node in made:
        print(shutil.copyfile(DOCS / node / "en.md", DOCS / f"{node}.md").relative_to(ROOT))
    wrong = [f"{path.relative_to(ROOT)}{at}: empty" for at, text in texts(made).items() if not text]
    for language in LANGUAGES:
        have, want = texts(read(language)), texts(made)
        file = Path("locales", language, "nodeDefs.json")
        wrong += [f"{file}{at}: missing" for at in want if at not in have]
        wrong += [f"{file}{at}: no such node, input or output" for at in have if at not in want]
    print(*wrong, sep="\n")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
