"""The real ComfyUI page in the system's Chromium, driven through Playwright."""

from __future__ import annotations

import json
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import ConsoleMessage, Response

Workflow = dict[str, Any]

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
PLACES = {
    "darwin": ["/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"],
    "win32": [
        r"C:\Program Files\Google\Chrome\Application\chrome.exe",
        r"C:\Program Files (x86)\Microsoft\Edge\Application\msedge.exe",
    ],
}
SWITCHES = [
    "--no-sandbox",  # not available in a container
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    # The page may reach only its own server.
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
]
MIN_NODE_TYPES = 100
# The page opens the last workflow or its default one, which would replace ours if it loaded later.
READY = f"""() => !!(window.app?.graph?.nodes?.length && window.LiteGraph
    && Object.keys(LiteGraph.registered_node_types).length > {MIN_NODE_TYPES})"""
# Errors that ComfyUI's page always shows: kept out of Page.errors.
NOISE = (
    "Failed to load resource",  # is in Page.failed, with its URL
    "ComfyApp graph accessed before initialization",
    "Content Security Policy",  # its default workflow asks a model hub for file sizes
)
NEVER_THERE = "/user.css"  # requested by the page, missing on every server
DIALOGS = ".p-dialog, .comfy-modal, .p-toast-message"


class NoBrowserError(RuntimeError):
    """No Chromium on this machine."""


def browser() -> str:
    """Path of a Chromium. Raises NoBrowserError."""
    found = [path for name in NAMES if (path := shutil.which(name))]
    found += [place for place in PLACES.get(sys.platform, []) if Path(place).is_file()]
    if not found:
        raise NoBrowserError(
            f"no browser found, looked for {', '.join(NAMES)}; install one, "
            "on Debian and Ubuntu with `apt-get install chromium`"
        )
    return found[0]


class Page:
    """Opens `url` in a `with` block, and collects what goes wrong in the page.

    errors    messages of console.error, without NOISE
    crashes   uncaught exceptions
    failed    `status url` of every response with status 400 or higher
    """

    def __init__(self, url: str, size: tuple[int, int] = (1400, 900), timeout: float = 120.0):
        self.url, self.size, self.timeout = url, size, timeout
        self.errors: list[str] = []
        self.crashes: list[str] = []
        self.failed: list[str] = []

    def __enter__(self) -> Page:
        executable = browser()
        from playwright.sync_api import sync_playwright

        self._playwright = sync_playwright().start()
        try:
            self._browser = self._playwright.chromium.launch(executable_path=executable, args=SWITCHES, headless=True)
            width, height = self.size
            # The page caches scripts in a service worker and node definitions in storage.
            context = self._browser.new_context(viewport={"width": width, "height": height})
            context.set_default_timeout(self.timeout * 1000)
            self.page = context.new_page()
            self._listen()
            self.reload()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with suppress(AttributeError):  # the launch itself failed
            self._browser.close()
        self._playwright.stop()

    # ----- the page

    def reload(self) -> None:
        """Reload the page, and wait until the graph and the node types are there."""
        self.page.goto(self.url)
        self.page.wait_for_function(READY)

    def js(self, code: str, argument: Any = None) -> Any:
        """Evaluate a JavaScript function (`x => ...`) or expression; promises are awaited."""
        return self.page.evaluate(code, argument)

    def has_node(self, node_id: str) -> bool:
        """Whether the page knows a node type."""
        return bool(self.js("id => id in LiteGraph.registered_node_types", node_id))

    def screenshot(self, path: Path) -> Path:
        """Save a screenshot of the page as PNG."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=str(path))
        return path

    def clip(self, path: Path, box: tuple[float, float, float, float], quality: int) -> Path:
        """Save a part of the page, (left, top, width, height) in pixels, as JPEG."""
        self._drawn()
        part = dict(zip(("x", "y", "width", "height"), box, strict=True))
        self.page.screenshot(path=str(path), type="jpeg", quality=quality, clip=part)
        return path

    def dialogs(self) -> list[str]:
        """Text of every open dialog and message."""
        shown = self.page.locator(DIALOGS).locator("visible=true")
        return [shown.nth(i).inner_text() for i in range(shown.count())]

    # ----- workflows

    def load(self, workflow: Workflow) -> list[str]:
        """Load a UI-format workflow; returns the types of the nodes in the graph."""
        self.js("w => app.loadGraphData(w)", workflow)
        self._drawn()
        return list(self.js("() => app.graph.nodes.map(node => node.type)"))

    def prompt(self) -> dict[str, dict[str, Any]]:
        """The API-format prompt that the page would queue, without `_meta`."""
        output = self.js("() => app.graphToPrompt().then(made => made.output)")
        return {key: {k: v for k, v in node.items() if k != "_meta"} for key, node in output.items()}

    def queue(self) -> str:
        """Press Run; returns the prompt's id, to follow it with `Client.wait`. Raises RuntimeError."""
        with self.page.expect_response(lambda reply: reply.url.endswith("/api/prompt")) as reply:
            self.js("() => app.queuePrompt(0, 1)")
        answer = reply.value.json()
        if "prompt_id" not in answer:
            raise RuntimeError(f"the server rejected the page's prompt: {answer}")
        return str(answer["prompt_id"])

    def from_api(self, prompt: dict[str, Any], arrange: bool = True) -> Workflow:
        """Load an API-format prompt; returns the workflow in UI format."""
        self.js("p => app.loadApiJson(p, 'prompt.json')", prompt)
        if arrange:
            self.js("() => app.graph.arrange()")
        self._drawn()
        return self.workflow()

    def workflow(self) -> Workflow:
        """The workflow in the page, as it would be saved."""
        return dict(json.loads(self.js("() => JSON.stringify(app.graph.serialize())")))

    def fit(self) -> None:
        """Bring the whole graph into view."""
        self.js("() => app.canvas.fitViewToSelectionAnimated({duration: 1})")
        self._drawn()

    # ----- inside

    def _drawn(self) -> None:
        """Let the page draw twice, so that widgets have their values."""
        self.js("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def _listen(self) -> None:
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self.crashes.append(str(error)))
        self.page.on("response", self._response)

    def _console(self, message: ConsoleMessage) -> None:
        if message.type == "error" and not any(noise in message.text for noise in NOISE):
            self.errors.append(message.text)

    def _response(self, response: Response) -> None:
        if response.status >= 400 and not response.url.endswith(NEVER_THERE):
            self.failed.append(f"{response.status} {response.url}")
