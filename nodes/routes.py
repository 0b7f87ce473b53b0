"""What the page asks the server for."""

from __future__ import annotations

import asyncio

from aiohttp import web

from ..loader.comfyui.server import running_server
from ..loader.sessions.listing import next_free, saved_sessions

SESSIONS = "/hswq/sessions"


def add_routes() -> None:
    """Register the routes; ComfyUI serves each under /api too."""
    running_server().routes.get(SESSIONS)(_sessions)


async def _sessions(request: web.Request) -> web.Response:
    """``{"sessions": rows, "next": name}``: see ``saved_sessions``; ``next`` is a free name after that in the query."""
    # Sessions are megabytes: reading them must not block the server.
    rows = await asyncio.to_thread(saved_sessions)
    return web.json_response({"sessions": rows, "next": next_free(request.query.get("name", ""))})
