"""Node layout: columns from left to right, narrow enough to read on a small screen, with the note in the first."""

from __future__ import annotations

from typing import Any

from rig.graph import BYPASSED
from rig.page import Page

from make.templates.jobs import Template

GAP, TITLE = 40, 30
NOTE, NOTE_SIZE = "MarkdownNote", (400, 330)
# Sizes of nodes that show text or pictures; the page sizes the others.
SIZES = {
    "CLIPTextEncode": (320, 160),
    "SaveImage": (320, 380),
    "PreviewAny": (400, 300),
    "VAEDecode": (210, 0),
    "HSWQCalibration": (320, 220),
    "HSWQCalibrationPrompts": (360, 270),
    "HSWQConverter": (360, 640),
    "HSWQCompare": (480, 340),
    "PreviewImage": (400, 440),
}
# Where the page's own title would be ambiguous.
TITLES = {"seed": "Seed", "fp8_sampler": "KSampler (FP8)", "fp8_decode": "VAE Decode (FP8)"}


def make(page: Page, template: Template) -> dict[str, Any]:
    """The workflow in UI format, as the page saves it."""
    prompt, ids = numbered(template.prompt)
    workflow = page.from_api(prompt, arrange=False)
    nodes = {ids[str(entry["id"])]: entry for entry in workflow["nodes"]}
    for key, entry in nodes.items():
        if key in TITLES:
            entry["title"] = TITLES[key]
        wide, high = SIZES.get(entry["type"], (0, 0))
        entry["size"] = [max(entry["size"][0], wide), max(entry["size"][1], high)]
    for key in template.bypassed:
        nodes[key]["mode"] = BYPASSED
    number = len(nodes) + 1
    nodes[NOTE] = _note(number, template.note)
    first, *others = template.columns
    place(nodes, ((*first, NOTE), *others))
    workflow["nodes"].append(nodes[NOTE])
    workflow["last_node_id"] = number
    workflow["extra"].pop("ds", None)  # this page's view position: without it, opening the file shows all of it
    return workflow


def place(nodes: dict[str, dict[str, Any]], columns: tuple[tuple[str, ...], ...]) -> None:
    """Set the positions. Raises ValueError for a node without a place."""
    homeless = nodes.keys() - {key for column in columns for key in column}
    if homeless:
        raise ValueError(f"nodes {sorted(homeless)}: in no column")
    left = 0.0
    for column in columns:
        present, top = [nodes[key] for key in column if key in nodes], 0.0
        for entry in present:
            entry["pos"] = [left, top]
            top += entry["size"][1] + TITLE + GAP
        left += max((entry["size"][0] + GAP for entry in present), default=0)


def numbered(prompt: dict[str, dict[str, Any]]) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """The prompt with node ids 1, 2, 3..., as the page expects, and {id: key}."""
    ids = {key: str(i) for i, key in enumerate(prompt, 1)}

    def link(value: Any) -> Any:
        return [ids[value[0]], value[1]] if isinstance(value, list) else value

    entries = {
        ids[key]: {**entry, "inputs": {name: link(value) for name, value in entry["inputs"].items()}}
        for key, entry in prompt.items()
    }
    return entries, {number: key for key, number in ids.items()}


def _note(number: int, text: str) -> dict[str, Any]:
    return {
        "id": number,
        "type": NOTE,
        "pos": [0, 0],
        "size": list(NOTE_SIZE),
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": [],
        "outputs": [],
        "properties": {},
        "widgets_values": [text],
    }
