"""From the template browser to a verdict: calibrate, convert, report and compare by clicks in the real page."""

from __future__ import annotations

import pytest
from rig import flow
from rig.mouse import Mouse, open_template, refresh, set_widgets

pytestmark = [pytest.mark.comfy, pytest.mark.page]

QUICK = {"EmptyLatentImage": {"width": 64, "height": 64}, "KSampler": {"steps": 2}}
SHOWN = """([type, text]) => {
    const node = app.graph.nodes.find(node => node.type === type)
    return node.imgs?.[0]?.naturalWidth > 0 && (!text || node.widgets.some(w => String(w.value).includes(text)))
}"""


def test_calibrate_convert_report_compare(page, server, models):
    original = models.sd15()
    page.reload()  # the page reads the model lists when it opens
    mouse = Mouse(page)

    open_template(page, f"sd15_{flow.CALIBRATE}")
    set_widgets(page, {**QUICK, "HSWQCalibration": {"session": "clicked"}})
    set_widgets(page, {"HSWQConverter": {"session": "clicked", "method": "hswq", "filename_prefix": "clicked"}})
    page.js("""() => {
        const report = LiteGraph.createNode('HSWQReport')
        report.pos = [0, 900]
        app.graph.add(report)
        const converter = app.graph.nodes.find(node => node.type === 'HSWQConverter')
        converter.connect(converter.findOutputSlot('path'), report, report.findInputSlot('path'))
    }""")
    page.fit()
    mouse.choose("CheckpointLoaderSimple", "ckpt_name", original)
    server.client.wait(mouse.run()).check()
    page.page.wait_for_function(SHOWN, arg=["HSWQReport", ""])
    (file,) = (server.output / "checkpoints").glob("clicked_*.safetensors")

    open_template(page, f"sd15_{flow.COMPARE}")
    refresh(page)  # the loaders list the new file
    set_widgets(page, QUICK)
    page.fit()
    mouse.choose("CheckpointLoaderSimple", "ckpt_name", original)
    mouse.choose("HSWQLoader", "ckpt_name", file.name)
    server.client.wait(mouse.run()).check()
    page.page.wait_for_function(SHOWN, arg=["HSWQCompare", "Verdict: "])
    assert mouse.clicks == 8
    assert (page.errors, page.crashes, page.failed) == ([], [], [])
