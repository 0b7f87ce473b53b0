"""What a user does in the page, by real clicks."""

from __future__ import annotations

from rig.page import Page

PACK = "ComfyUI-HSWQ"
CARD = "template-workflow-"


def set_widgets(page: Page, values: dict[str, dict[str, object]]) -> None:
    """{node type: {widget: value}}, without clicks: what a test wants small and quick."""
    page.js(
        """values => { for (const node of app.graph.nodes) for (const [name, value] of
            Object.entries(values[node.type] ?? {})) node.widgets.find(w => w.name === name).value = value }""",
        values,
    )


def open_template(page: Page, name: str) -> None:
    """Browse Templates, our pack, the card."""
    page.js("() => app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    page.page.get_by_text(PACK).first.click()
    page.page.get_by_test_id(CARD + name).click()
    page.page.wait_for_function("() => app.graph.nodes.some(node => node.type === 'MarkdownNote')")


class Mouse:
    """Real clicks on the canvas, counted."""

    def __init__(self, page: Page) -> None:
        self.page, self.clicks = page, 0

    def choose(self, node_type: str, widget: str, value: str) -> None:
        """Two clicks: the widget, then the value in its list."""
        spot = self.page.js(
            """([type, name]) => {
                const node = app.graph.nodes.find(node => node.type === type)
                const widget = node.widgets.find(widget => widget.name === name)
                const point = [node.pos[0] + node.size[0] / 2, node.pos[1] + widget.last_y + 10]
                const canvas = app.canvas.canvas.getBoundingClientRect(), at = app.canvas.ds
                return [0, 1].map(i => (point[i] + at.offset[i]) * at.scale + [canvas.left, canvas.top][i])
            }""",
            [node_type, widget],
        )
        self.page.page.mouse.click(*spot)
        self.page.page.locator(".litecontextmenu .litemenu-entry", has_text=value).first.click()
        self.clicks += 2

    def run(self) -> str:
        """One click; the prompt's id."""
        with self.page.page.expect_response(lambda reply: reply.url.endswith("/api/prompt")) as reply:
            self.page.page.get_by_test_id("queue-button").click()
        self.clicks += 1
        return str(reply.value.json()["prompt_id"])
