"""The picture that the template browser shows for a workflow: its main nodes, with a title."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rig.page import Page

from make.templates.jobs import Template
from make.templates.layout import NOTE

SIDE = 512  # the browser shows squares of 224 pixels, at double density on many screens
BAND = 104  # height of the title
MARGIN, TITLE = 24, 30
QUALITY = 82

# Moves nodes into the upper part of the square, without the space they reserve for results.
SHOW = """([ids, side, band, margin, title]) => {
    const nodes = app.graph.nodes.filter(node => ids.includes(String(node.id)))
    for (const node of nodes) node.setSize([node.size[0], node.computeSize()[1]])
    const of = (choose, edge) => choose(...nodes.map(edge))
    const x = of(Math.min, node => node.pos[0]), y = of(Math.min, node => node.pos[1] - title)
    const width = of(Math.max, node => node.pos[0] + node.size[0]) - x + 2 * margin
    const height = of(Math.max, node => node.pos[1] + node.size[1]) - y + 2 * margin
    const scale = Math.min(side / width, (side - band) / height, 1)
    const canvas = app.canvas.canvas.getBoundingClientRect()
    const [left, top] = [(innerWidth - side) / 2, (innerHeight - side) / 2]
    app.canvas.ds.scale = scale
    app.canvas.ds.offset[0] = (left - canvas.left + side / 2) / scale - (x - margin + width / 2)
    app.canvas.ds.offset[1] = (top - canvas.top + (side - band) / 2) / scale - (y - margin + height / 2)
    app.canvas.min_font_size_for_lod = 0  // small text too
    app.canvas.deselectAll()
    app.canvas.setDirty(true, true)
    return [left, top]
}"""
CAPTION = """([[left, top], side, band, [big, small]]) => {
    document.getElementById('hswq-caption')?.remove()
    const box = document.createElement('div')
    box.id = 'hswq-caption'
    box.style = `position: fixed; z-index: 100000; left: ${left}px; top: ${top + side - band}px; width: ${side}px;
        height: ${band}px; box-sizing: border-box; padding: 14px 24px; background: #101820; color: #fff;
        font-family: Inter, sans-serif; line-height: 1.25`
    for (const [text, size, weight] of [[big, 36, 700], [small, 26, 400]]) {
        const line = document.createElement('div')
        line.textContent = text
        line.style = `font-size: ${size}px; font-weight: ${weight}; white-space: nowrap`
        box.append(line)
    }
    document.body.append(box)
}"""


def picture(page: Page, workflow: dict[str, Any], template: Template, ids: dict[str, str], path: Path) -> Path:
    """Save it as JPEG; `ids` are {id: key} of the nodes, and all of the template's focus is visible."""
    nodes = [node for node in workflow["nodes"] if node["type"] != NOTE]
    page.load({**workflow, "nodes": nodes})
    shown = [number for number, key in ids.items() if key in template.focus]
    corner = page.js(SHOW, [shown, SIDE, BAND, MARGIN, TITLE])
    page.js(CAPTION, [corner, SIDE, BAND, template.title])
    try:
        return page.clip(path, (*corner, SIDE, SIDE), QUALITY)
    finally:
        page.js("() => document.getElementById('hswq-caption').remove()")
