"""The nodes in the real page: adding them, and the whole workflow in one Run."""

from __future__ import annotations

import pytest
from rig import flow, tiny
from rig.pack import ROOT

pytestmark = [pytest.mark.comfy, pytest.mark.page]

NODES = [path.name for path in sorted((ROOT / "web" / "docs").iterdir()) if path.is_dir()]


def test_every_node_is_in_the_page_and_can_be_added(page):
    for node in NODES:
        assert page.has_node(node)
        assert page.js("id => app.graph.add(LiteGraph.createNode(id)).type", node) == node


def test_calibrate_and_convert_in_the_page(page, server, models):
    """The SD1.5 template with a small checkpoint chosen: Run, and the FP8 file is there."""
    models.sd15()
    page.reload()  # the page reads the model lists when it opens
    page.load(flow.shipped("sd15", flow.CALIBRATE))
    page.js("""() => {
        const set = (type, name, value) => app.graph.nodes.filter(node => node.type === type)
            .forEach(node => node.widgets.find(widget => widget.name === name).value = value)
        set('CheckpointLoaderSimple', 'ckpt_name', 'sd15-small.safetensors')
        set('EmptyLatentImage', 'width', 64)
        set('EmptyLatentImage', 'height', 64)
        set('KSampler', 'steps', 2)
        set('HSWQConverter', 'method', 'hswq')
        for (const type of ['HSWQCalibration', 'HSWQConverter']) set(type, 'session', 'in_page')
    }""")
    result = server.client.wait(page.queue()).check()
    assert result.images()
    assert list((server.output / "checkpoints").glob("sd15-small_hswq_r2_0.25_comfy*.safetensors"))
    report = """() => app.graph.nodes.find(node => node.type === 'HSWQConverter')
        .widgets.map(widget => String(widget.value)).find(text => text.includes('quantized'))"""
    page.page.wait_for_function(report)
    assert f"= {len(tiny.layer_shapes(tiny.make('sd15-small')))} layers" in page.js(report)
    assert (page.errors, page.crashes, page.failed) == ([], [], [])
