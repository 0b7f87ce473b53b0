"""Retakes the README's pictures from the real ComfyUI page: docs/pictures/*.png. Needs Chromium.

    nox -s bench -- screenshots.py

The trained Flux-layout reference model stands in for a real one: its text encoder and picture code are test nodes.
"""

from __future__ import annotations

import io
from typing import Any

from make.templates.files import offer_models
from make.templates.layout import place
from PIL import Image
from reference_models.prompts import calibration_prompts, evaluation_prompts
from rig import flow, graph, pack
from rig.client import Prompt, Result
from rig.page import Page
from rig.prompts import node
from rig.server import ComfyServer

PICTURES = pack.ROOT / "docs" / "pictures"
SESSION, PIXELS = "flux_01", 128
SIZES = {
    "HSWQCalibration": (320, 240),
    "HSWQConverter": (360, 640),
    "HSWQReport": (520, 520),
    "HSWQCompare": (620, 420),
    "SaveImage": (270, 260),
}
BUTTON = "Choose session…"


def main() -> None:
    """All pictures."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    testnodes = pack.ROOT / "bench" / "rig" / "testnodes"
    with ComfyServer([testnodes], threads=2) as server, Page(server.url, size=(1600, 900)) as page:
        for caption in calibration_prompts(12):
            run(server, flow.calibration(prompt(server, caption)))
        shoot = Shots(server, page)
        shoot.calibrate_and_convert()
        shoot.compare()
        shoot.sessions()
        shoot.templates()


def prompt(server: ComfyServer, caption: Any, job: str = flow.CALIBRATE) -> Prompt:
    """A shipped workflow on the trained model."""
    settings = {"session": SESSION, "steps": 20, "size": PIXELS, "seed": caption.seed, "caption": caption.caption}
    return flow.prepare(server, "flux", job, **settings)


def run(server: ComfyServer, queued: Prompt) -> Result:
    """One queue item."""
    return server.client.run(queued).check()


class Shots:
    """Each method makes one picture or two."""

    def __init__(self, server: ComfyServer, page: Page) -> None:
        self.server, self.page = server, page
        self.caption = evaluation_prompts(1)[0]

    def calibrate_and_convert(self) -> None:
        """The template after its run, with a report, and the report itself."""
        made = prompt(self.server, self.caption)
        made = {key: entry for key, entry in made.items() if entry["class_type"] != "PreviewAny"}
        converter = graph.find(made, "HSWQConverter")
        made["report"] = node("HSWQReport", session=SESSION, file="none", path=[converter, 0])
        made = graph.set_input(made, converter, format="v2")
        first = ("UNETLoader", "RigCaption", "ConditioningZeroOut", "EmptySD3LatentImage")
        columns = (first, ("HSWQCalibration", "FluxGuidance"), ("KSampler", "RigPicture", "SaveImage"))
        result = self._run(made, (*columns, ("HSWQConverter",), ("HSWQReport",)))
        self.page.screenshot(PICTURES / "calibrate_and_convert.png")
        self._save_picture(result, "report")

    def compare(self) -> None:
        """FP16 against the file just made."""
        reference = prompt(self.server, self.caption)
        loader, sampler = graph.find(reference, "UNETLoader"), graph.find(reference, "KSampler")
        decode = graph.find(reference, "RigPicture")
        gone = ("HSWQCalibration", "HSWQConverter", "PreviewAny", "SaveImage")
        both = {key: entry for key, entry in reference.items() if entry["class_type"] not in gone}
        both[sampler]["inputs"]["model"] = [loader, 0]
        file = next((self.server.output / "diffusion_models").glob("*_v2.safetensors")).name
        both["fp8"] = node("HSWQDiffusionModelLoader", model_name=file)
        both["fp8_sampler"] = {**both[sampler], "inputs": {**both[sampler]["inputs"], "model": ["fp8", 0]}}
        both["fp8_decode"] = node("RigPicture", samples=["fp8_sampler", 0])
        both["compare"] = node("HSWQCompare", reference=[decode, 0], candidate=["fp8_decode", 0])
        first = ("UNETLoader", "HSWQDiffusionModelLoader", "RigCaption", "EmptySD3LatentImage")
        columns = (first, ("FluxGuidance", "ConditioningZeroOut"), ("KSampler",), ("RigPicture",), ("HSWQCompare",))
        self._run(both, columns)
        self.page.screenshot(PICTURES / "compare.png")

    def sessions(self) -> None:
        """The list of saved sessions, opened by the Calibration node's button."""
        self.page.js(
            """label => {
                app.graph.clear()
                const added = LiteGraph.createNode('HSWQCalibration')
                app.graph.add(added)
                added.widgets.find(widget => [widget.label, widget.name].includes(label)).callback()
            }""",
            BUTTON,
        )
        box = self.page.page.locator("dialog[open]")
        box.locator(".hswq-session").first.wait_for()
        box.screenshot(path=str(PICTURES / "sessions.png"))
        self.page.page.keyboard.press("Escape")

    def templates(self) -> None:
        """The template browser, showing our pack."""
        offer_models(self.server.base)
        self.page.reload()
        self.page.js("() => app.extensionManager.command.execute('Comfy.BrowseTemplates')")
        self.page.page.get_by_text("ComfyUI-HSWQ").first.click()
        self.page.page.wait_for_timeout(3000)
        self.page.screenshot(PICTURES / "templates.png")

    def _run(self, made: Prompt, columns: tuple[tuple[str, ...], ...]) -> Result:
        """Lay out a graph by node types, queue it from the page, and wait until everything is shown."""
        self.page.reload()  # the page reads the model lists when it opens
        self.page.from_api(made, arrange=False)
        workflow = self.page.workflow()
        for entry in workflow["nodes"]:
            wide, high = SIZES.get(entry["type"], (0, 0))
            entry["size"] = [max(entry["size"][0], wide), max(entry["size"][1], high)]
            # After the run the seeds must still be the ones it used.
            entry["widgets_values"] = ["fixed" if v == "randomize" else v for v in entry.get("widgets_values") or []]
        place(*_keyed(workflow["nodes"], columns))
        self.page.load(workflow)
        self.page.fit()
        result = self.server.client.wait(self.page.queue()).check()
        self.page.page.wait_for_timeout(3000)  # pictures are fetched and drawn
        return result

    def _save_picture(self, result: Result, name: str) -> None:
        image = next(image for image in result.images() if image["type"] == "temp")
        Image.open(io.BytesIO(self.server.client.view(image))).save(PICTURES / f"{name}.png", optimize=True)


def _keyed(
    nodes: list[dict[str, Any]], columns: tuple[tuple[str, ...], ...]
) -> tuple[dict[str, dict[str, Any]], tuple[tuple[str, ...], ...]]:
    """Nodes keyed by type and number, and the columns with these keys."""
    named: dict[str, dict[str, Any]] = {}
    for entry in nodes:
        count = sum(key.split("#")[0] == entry["type"] for key in named)
        named[f"{entry['type']}#{count}"] = entry
    return named, tuple(
        tuple(key for kind in column for key in named if key.split("#")[0] == kind) for column in columns
    )


if __name__ == "__main__":
    main()
