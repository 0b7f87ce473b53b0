"""HSWQ Report in the real page: after Run, its picture is on the node."""

from __future__ import annotations

import pytest
from rig import flow

pytestmark = [pytest.mark.comfy, pytest.mark.page]

ADD = """() => {
    app.graph.clear()
    const node = LiteGraph.createNode('HSWQReport')
    node.pos = [40, 60]
    app.graph.add(node)
    node.widgets.find(widget => widget.name === 'session').value = 'shown_in_page'
    return [node.widgets.map(widget => widget.name), node.inputs.map(input => input.name)]
}"""
PICTURE = """() => {
    const [image] = app.graph.nodes[0].imgs ?? []
    return image?.complete && image.naturalWidth ? [image.naturalWidth, image.naturalHeight] : null
}"""


def test_the_picture_is_shown_on_the_node(page, server):
    workflow = flow.prepare(server, "flux", flow.CALIBRATE, session="shown_in_page")
    server.client.run(flow.calibration(workflow)).check()
    page.reload()
    widgets, inputs = page.js(ADD)
    assert widgets[:2] == ["session", "file"]
    assert "path" in inputs
    assert "path" not in widgets
    server.client.wait(page.queue()).check()
    shown = page.page.wait_for_function(PICTURE, timeout=60_000).json_value()
    assert shown == [1600, 1200]
    assert page.crashes == []
