"""The shipped workflows in the real page: the template browser, what opens, the clicks to the first file."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from make.templates.files import offer_models
from make.templates.thumbnail import SIDE as WIDTH
from rig import flow, graph
from rig.mouse import CARD, PACK, Mouse, open_template, set_widgets
from rig.page import Page

pytestmark = [pytest.mark.comfy, pytest.mark.page]

PROMPTS = "HSWQCalibrationPrompts"


@pytest.fixture(scope="module")
def stocked(server, page) -> Iterator[Page]:
    """The page of a server that has files with the names of the templates' models."""
    made = offer_models(server.base)
    page.reload()  # the page reads the model lists when it opens
    yield page
    for path in made:
        path.unlink()


@pytest.fixture
def small(page, models) -> Page:
    """The page of a server with a small checkpoint."""
    models.sd15()
    page.reload()
    return page


@pytest.mark.parametrize("name", flow.templates())
def test_a_template_opens_without_fault_and_means_what_the_rig_runs(stocked, server, name):
    workflow = flow.template(name)
    types = stocked.load(workflow)
    assert sorted(types) == sorted(node["type"] for node in workflow["nodes"])
    assert stocked.js("() => app.graph.nodes.every(node => node.type in LiteGraph.registered_node_types)")
    assert stocked.prompt() == graph.to_prompt(workflow, server.client.object_info())
    assert faults(stocked) == ([], [], [], 0)


def faults(page: Page) -> tuple[list[str], list[str], list[str], int]:
    """The errors the page reports, and how many of its error panels (missing models) are open."""
    page.page.wait_for_timeout(300)  # panels open a moment after the graph
    return page.errors, page.crashes, page.dialogs(), page.page.get_by_text("View details").count()


def test_a_missing_model_is_a_fault(stocked):
    workflow = flow.shipped("flux", flow.LOAD)
    (loader,) = (node for node in workflow["nodes"] if node["type"] == "VAELoader")
    loader["widgets_values"] = ["not_there.safetensors"]
    stocked.load(workflow)
    assert faults(stocked)[-1] == 1
    stocked.load(flow.shipped("flux", flow.LOAD))


def test_the_browser_lists_all_with_their_pictures(page):
    page.reload()
    page.js("() => app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    page.page.get_by_text(PACK).first.click()
    names = flow.templates()
    cards = page.page.locator(f"[data-testid^={CARD}]")
    cards.nth(len(names) - 1).wait_for(state="attached")
    assert sorted(card.get_attribute("data-testid") for card in cards.all()) == [CARD + name for name in names]
    for card in cards.all():
        card.scroll_into_view_if_needed()  # a picture is fetched when it becomes visible
        card.locator("img[src^=blob]").wait_for()
        assert card.locator("img").evaluate("image => image.decode().then(() => image.naturalWidth)") == WIDTH
    assert page.failed == []
    page.page.keyboard.press("Escape")


def test_the_first_fp8_file_is_three_clicks_away(small, server):
    """Choose the checkpoint, then Run. The settings that keep the test small and quick do not count as clicks."""
    open_template(small, f"sd15_{flow.CALIBRATE}")
    quick = {"EmptyLatentImage": {"width": 64, "height": 64}, "KSampler": {"steps": 2}}
    set_widgets(small, {**quick, "HSWQConverter": {"method": "hswq"}})
    small.fit()
    mouse = Mouse(small)
    mouse.choose("CheckpointLoaderSimple", "ckpt_name", "sd15-small.safetensors")
    server.client.wait(mouse.run()).check()
    assert mouse.clicks == 3
    assert list((server.output / "checkpoints").glob("sd15-small_hswq_r2_0.25_comfy*.safetensors"))


def test_a_batch_count_of_three_draws_three_prompts(small, server):
    small.load(flow.template(flow.OVER_PROMPTS))
    quick = {"EmptyLatentImage": {"width": 64, "height": 64}, "KSampler": {"steps": 1}}
    chosen = {"CheckpointLoaderSimple": {"ckpt_name": "sd15-small.safetensors"}}
    set_widgets(small, {**quick, **chosen, "HSWQCalibration": {"session": "three_prompts"}})
    queued = []
    small.page.on("response", lambda reply: queued.append(reply) if reply.url.endswith("/api/prompt") else None)
    small.js("() => app.queuePrompt(0, 3)")
    asked = [json.loads(reply.request.post_data)["prompt"] for reply in queued]
    sent = [prompt[graph.find(prompt, PROMPTS)]["inputs"]["index"] for prompt in asked]
    assert sent == [0, 1, 2]
    results = [server.client.wait(reply.json()["prompt_id"]).check() for reply in queued]
    assert len({server.client.view(image) for result in results for image in result.images()}) == 3
    index = "() => app.graph.nodes.find(node => node.type === 'HSWQCalibrationPrompts').widgets[0].value"
    assert small.js(index) == 3
    small.page.wait_for_function(
        """() => app.graph.nodes.find(node => node.type === 'HSWQCalibrationPrompts')
            .widgets.some(widget => String(widget.value).startsWith('3 of 128: '))"""
    )
    assert (small.errors, small.crashes) == ([], [])


@pytest.mark.parametrize("family", flow.FAMILIES)
def test_the_converter_can_be_switched_off_and_on(page, server, family):
    """Ctrl+B on that one node leaves a valid workflow that only draws the picture."""
    switch = "mode => { app.graph.nodes.find(node => node.type === 'HSWQConverter').mode = mode }"
    page.load(flow.shipped(family, flow.CALIBRATE))
    whole = page.prompt()
    page.js(switch, graph.BYPASSED)
    assert page.prompt() == flow.calibration(whole)
    page.load(flow.template(flow.OVER_PROMPTS))
    assert "HSWQConverter" not in str(page.prompt())
    page.js(switch, 0)
    assert "HSWQConverter" in str(page.prompt())
