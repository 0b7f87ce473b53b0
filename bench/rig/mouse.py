"""User actions in the page, performed with real clicks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from playwright.sync_api import Locator
from playwright.sync_api import TimeoutError as PageTimeoutError

from rig.page import Page

PACK = "ComfyUI-HSWQ"
CARD = "template-workflow-"
APART_MS = 400  # two clicks in one place within 300 ms are a double click
# A busy page mistakes a click for the end of a drag, or ignores it.
PRESSES, MOST_MS = 3, 10_000


def set_widgets(page: Page, values: dict[str, dict[str, object]]) -> None:
    """Set {node type: {widget: value}} without clicks, for values a test wants small and quick."""
    page.js(
        """values => { for (const node of app.graph.nodes) for (const [name, value] of
            Object.entries(values[node.type] ?? {})) node.widgets.find(w => w.name === name).value = value }""",
        values,
    )


def open_template(page: Page, name: str) -> None:
    """Click Browse Templates, our pack and the card, until the template is open and the browser closed."""
    page.js("() => { window.rigBefore = app.graph.nodes.slice() }")
    page.js("() => app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    page.page.get_by_text(PACK).first.click()
    card = page.page.get_by_test_id(CARD + name)
    card.click()
    # The previously open workflow may be a template too.
    page.page.wait_for_function(
        """() => app.graph.nodes.some(node => node.type === 'MarkdownNote')
            && !app.graph.nodes.some(node => window.rigBefore.includes(node))"""
    )
    card.wait_for(state="hidden")


def refresh(page: Page) -> None:
    """Press R, so that the nodes list the current files."""
    with page.page.expect_response(lambda reply: reply.url.endswith("/api/object_info")):
        page.page.keyboard.press("r")


def press(page: Page, spot: Callable[[], list[float]], opens: Locator) -> None:
    """Click the middle of something on the canvas until what it opens appears.

    Args:
        spot: its current position, [x, y] in page pixels.
    """
    page.page.wait_for_function("() => !document.querySelector('.p-blockui-mask')")  # shown while the page starts
    for _ in range(PRESSES):
        page.page.wait_for_timeout(APART_MS)
        page.page.mouse.click(*spot())
        with suppress(PageTimeoutError):
            opens.wait_for(timeout=MOST_MS)
            break
    opens.wait_for(timeout=MOST_MS)


class Mouse:
    """Real clicks on the canvas, counted."""

    def __init__(self, page: Page) -> None:
        self.page, self.clicks = page, 0

    def choose(self, node_type: str, widget: str, value: str) -> None:
        """Two clicks: the widget, then the value in its list."""
        entry = self.page.page.locator(".litecontextmenu .litemenu-entry", has_text=value).first
        press(self.page, lambda: self._middle(node_type, widget), entry)
        entry.click()
        self.clicks += 2

    def _middle(self, node_type: str, widget: str) -> list[float]:
        spot: list[float] = self.page.js(
            """([type, name]) => {
                const node = app.graph.nodes.find(node => node.type === type)
                const widget = node.widgets.find(widget => widget.name === name)
                const point = [node.pos[0] + node.size[0] / 2, node.pos[1] + widget.last_y + 10]
                const canvas = app.canvas.canvas.getBoundingClientRect(), at = app.canvas.ds
                return [0, 1].map(i => (point[i] + at.offset[i]) * at.scale + [canvas.left, canvas.top][i])
            }""",
            [node_type, widget],
        )
        return spot

    def run(self) -> str:
        """One click; returns the prompt's id."""
        with self.page.page.expect_response(lambda reply: reply.url.endswith("/api/prompt")) as reply:
            self.page.page.get_by_test_id("queue-button").click()
        self.clicks += 1
        return str(reply.value.json()["prompt_id"])
