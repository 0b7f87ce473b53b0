"""Converts workflows from what the page saves (UI format) to what the server runs (API format).

A Python version of the page's own graphToPrompt, so that the example workflows can run
without a browser. Subgraphs, and inputs whose presence depends on another input, are refused.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from rig.client import Prompt

Node = dict[str, Any]
Link = list[Any]

MUTED, BYPASSED = 2, 4
DRAWN_ONLY = {"Note", "MarkdownNote"}
VIRTUAL = {"Reroute", "PrimitiveNode"}
WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COLOR"}
SEEDS = {"seed", "noise_seed"}


class GraphError(ValueError):
    """A workflow cannot be converted, or a node is not in a prompt."""


def to_prompt(workflow: dict[str, Any], object_info: dict[str, Any]) -> Prompt:
    """The API-format prompt of a UI-format workflow. Raises GraphError."""
    if workflow.get("definitions", {}).get("subgraphs"):
        raise GraphError("workflow has subgraphs: unpack them in the page (right click) and save")
    return _Converter(workflow, object_info).prompt()


# ----- changing a prompt


def find(prompt: Prompt, class_type: str) -> str:
    """Id of the only node of this class. Raises GraphError if there is none or more than one."""
    found = [key for key, node in prompt.items() if node["class_type"] == class_type]
    if len(found) != 1:
        present = sorted({node["class_type"] for node in prompt.values()})
        raise GraphError(f"{len(found)} nodes {class_type!r}, expected 1; there are {present}")
    return found[0]


def set_input(prompt: Prompt, node: str, **values: Any) -> Prompt:
    """A copy with inputs changed; `node` is an id, or the class of the only such node."""
    changed = copy.deepcopy(prompt)
    key = node if node in changed else find(changed, node)
    unknown = sorted(set(values) - set(changed[key]["inputs"]))
    if unknown:
        raise GraphError(f"{node}: no input {unknown}, it has {sorted(changed[key]['inputs'])}")
    changed[key]["inputs"].update(values)
    return changed


def replace_node(prompt: Prompt, node: str, class_type: str, **inputs: Any) -> Prompt:
    """A copy with one node replaced under the same id, so that its outputs stay linked."""
    changed = copy.deepcopy(prompt)
    key = node if node in changed else find(changed, node)
    changed[key] = {"class_type": class_type, "inputs": inputs}
    return changed


def drop_unused(prompt: Prompt, object_info: dict[str, Any]) -> Prompt:
    """A copy without the nodes that no output node needs (left over after a replacement)."""
    todo = [k for k, n in prompt.items() if object_info[n["class_type"]]["output_node"]]
    needed: set[str] = set()
    while todo:
        key = todo.pop()
        if key not in needed:
            needed.add(key)
            todo += [value[0] for value in prompt[key]["inputs"].values() if is_link(value)]
    return {key: copy.deepcopy(node) for key, node in prompt.items() if key in needed}


def is_link(value: Any) -> bool:
    """Whether an input of a prompt is linked: [node id, output index]."""
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)


# ----- converting


@dataclass(frozen=True)
class _Origin:
    """The ultimate origin of a link: an output, or a PrimitiveNode's value."""

    link: tuple[str, int] | None = None
    value: Any = None


class _Converter:
    def __init__(self, workflow: dict[str, Any], object_info: dict[str, Any]) -> None:
        self.nodes: dict[Any, Node] = {node["id"]: node for node in workflow["nodes"]}
        self.links: dict[Any, Link] = dict(map(_link, workflow.get("links") or []))
        self.info = object_info

    def prompt(self) -> Prompt:
        active = [node for node in self.nodes.values() if self._runs(node)]
        prompt = {str(node["id"]): self._entry(node) for node in active}
        for entry in prompt.values():  # links to nodes that do not run are cut
            inputs = entry["inputs"]
            entry["inputs"] = {k: v for k, v in inputs.items() if not is_link(v) or v[0] in prompt}
        return prompt

    def _runs(self, node: Node) -> bool:
        if node["type"] in DRAWN_ONLY | VIRTUAL or node.get("mode") in (MUTED, BYPASSED):
            return False
        if node["type"] not in self.info:
            raise GraphError(f"node {node['id']}: {node['type']!r} is not installed on the server")
        return True

    def _entry(self, node: Node) -> dict[str, Any]:
        inputs = self._widgets(node)
        for slot in node.get("inputs") or []:
            origin = self._origin(slot)
            if origin is not None:
                inputs[slot["name"]] = _wrapped(origin.value) if origin.link is None else [*origin.link]
        return {"class_type": node["type"], "inputs": inputs}

    def _widgets(self, node: Node) -> dict[str, Any]:
        values = node.get("widgets_values") or []
        names = list(widget_names(node["type"], self.info[node["type"]]))
        if isinstance(values, dict):
            return {name: _wrapped(values[name]) for name in names if name and name in values}
        if len(values) < len([name for name in names if name]):
            raise GraphError(
                f"node {node['id']} ({node['type']}): {len(values)} saved values for the widgets "
                f"{names}; save the workflow again with this version of the node"
            )
        return {name: _wrapped(value) for name, value in zip(names, values, strict=False) if name}

    # ----- links

    def _origin(self, slot: Node, wanted: str | None = None) -> _Origin | None:
        link = self.links.get(slot.get("link"))
        if link is None:
            return None
        source = self.nodes[link[1]]
        return self._output(source, link[2], wanted or str(slot["type"]))

    def _output(self, node: Node, index: int, wanted: str) -> _Origin | None:
        if node.get("mode") == MUTED:
            return None
        if node.get("mode") == BYPASSED:
            slot = _bypass(node, index, wanted)
            return self._origin(slot, wanted) if slot else None
        if node["type"] == "PrimitiveNode":
            return _Origin(value=node["widgets_values"][0])
        if node["type"] == "Reroute":
            return self._origin(node["inputs"][0], wanted)
        return _Origin(link=(str(node["id"]), int(index)))


def widget_names(class_type: str, info: dict[str, Any]) -> Iterator[str | None]:
    """Names of a node's widgets in the order of `widgets_values`; None for the page's own widgets."""
    for name, spec in _specs(info):
        kind, options = spec[0], (spec[1] if len(spec) > 1 else {})
        if isinstance(kind, str) and kind.startswith("COMFY_") and kind.endswith("_V3"):
            raise GraphError(f"{class_type}.{name}: inputs of type {kind} are not supported here")
        if options.get("forceInput") or not _is_widget(kind):
            continue
        yield name
        default = kind == "INT" and name in SEEDS
        if options.get("control_after_generate", default):
            yield None


def _specs(info: dict[str, Any]) -> Iterator[tuple[str, list[Any]]]:
    for group in ("required", "optional"):
        yield from info["input"].get(group, {}).items()


def _is_widget(kind: Any) -> bool:
    """Whether an input is a widget. A list is the older way to write a combo; of several types the first counts."""
    return isinstance(kind, list) or str(kind).split(",")[0] in WIDGET_TYPES


def _link(saved: Any) -> tuple[Any, Link]:
    """(id, [id, from node, from output, to node, to input, type]); newer files save objects."""
    if isinstance(saved, dict):
        keys = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
        saved = [saved[key] for key in keys]
    return saved[0], saved


def _bypass(node: Node, index: int, wanted: str) -> Node | None:
    """The input whose link replaces an output of a bypassed node."""
    inputs, made = node.get("inputs") or [], str(node["outputs"][index]["type"])
    fits: list[Callable[[Node], bool]] = [
        lambda slot: slot["type"] == wanted,
        lambda slot: _connects(slot["type"], made) and _connects(slot["type"], wanted),
    ]
    same = inputs[index : index + 1]
    if wanted == "*" and inputs:
        return dict((same or inputs)[0])
    if same and fits[1](same[0]):
        return dict(same[0])
    return next((dict(slot) for test in fits for slot in inputs if test(slot)), None)


def _connects(one: str, other: str) -> bool:
    if "*" in (one, other):
        return True
    return bool(set(str(one).split(",")) & set(str(other).split(",")))


def _wrapped(value: Any) -> Any:
    """Wrap a list value, so that it does not look like a link."""
    return {"__value__": value} if isinstance(value, list) else value
