"""The rig's page opens without errors, and agrees with the rig about workflows."""

from __future__ import annotations

import pytest
from rig import graph, prompts

pytestmark = [pytest.mark.comfy, pytest.mark.page]


def test_the_page_opens_without_errors(page):
    assert page.has_node("RigConditioning")
    assert (page.errors, page.crashes, page.failed, page.dialogs()) == ([], [], [], [])


@pytest.mark.parametrize(
    "prompt",
    [
        prompts.sd15("sd15-small.safetensors", seed=5),
        prompts.sdxl("sdxl-small.safetensors", "rig-taesd.safetensors"),
        prompts.flux("flux-tiny.safetensors", "rig-taef.safetensors"),
    ],
    ids=["sd15", "sdxl", "flux"],
)
def test_the_rig_converts_workflows_as_the_page_does(page, server, prompt):
    workflow = page.from_api(prompt)
    page.load(workflow)
    shown = page.prompt()
    assert sorted(node["class_type"] for node in shown.values()) == sorted(n["class_type"] for n in prompt.values())
    assert graph.to_prompt(workflow, server.client.object_info()) == shown


@pytest.mark.parametrize("mode", [graph.MUTED, graph.BYPASSED])
def test_muted_and_bypassed_nodes_too(page, server, mode):
    lora = prompts.node(
        "LoraLoader", model=["model", 0], clip=["model", 1], lora_name="x", strength_model=1.0, strength_clip=1.0
    )
    plain = prompts.sd15("sd15-small.safetensors")
    plain["positive"]["inputs"]["clip"] = ["lora", 1]
    workflow = page.from_api(prompts.insert(plain, "lora", lora))
    (node,) = [node for node in workflow["nodes"] if node["type"] == "LoraLoader"]
    node["mode"] = mode
    page.load(workflow)
    assert graph.to_prompt(workflow, server.client.object_info()) == page.prompt()


def test_reroutes_primitives_and_notes_too(page, server):
    page.from_api(prompts.sd15("sd15-small.safetensors"))
    page.js("""() => {
        const add = type => { const node = LiteGraph.createNode(type); app.graph.add(node); return node }
        const only = type => app.graph.nodes.find(node => node.type === type)
        const [loader, sampler] = [only('CheckpointLoaderSimple'), only('KSampler')]
        const [reroute, primitive] = [add('Reroute'), add('PrimitiveNode')]
        add('Note')
        loader.connect(0, reroute, 0)
        reroute.connect(0, sampler, 'model')
        primitive.connect(0, sampler, sampler.inputs.findIndex(input => input.name === 'steps'))
        primitive.widgets[0].value = 13
    }""")
    workflow, shown = page.workflow(), page.prompt()
    assert {"Reroute", "PrimitiveNode", "Note"} <= {node["type"] for node in workflow["nodes"]}
    converted = graph.to_prompt(workflow, server.client.object_info())
    assert converted == shown
    assert converted[graph.find(converted, "KSampler")]["inputs"]["steps"] == 13


def test_a_queued_workflow_runs(page, server, models):
    prompt = prompts.sd15(models.sd15(), seed=21)
    page.reload()  # the page reads the model lists when it opens
    page.from_api(prompt)
    assert server.client.wait(page.queue()).check().images()
    assert (page.errors, page.crashes, page.failed) == ([], [], [])
