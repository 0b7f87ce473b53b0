"""The page of the session's server; tests are skipped where there is no browser."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from rig.page import NoBrowserError, Page, browser
from rig.server import ComfyServer


@pytest.fixture(scope="module")  # left open, it would draw on and take half a core from the tests behind it
def page(server: ComfyServer) -> Iterator[Page]:
    """The real ComfyUI page, open and ready."""
    try:
        browser()
    except NoBrowserError as error:
        pytest.skip(str(error))
    with Page(server.url) as opened:
        yield opened
