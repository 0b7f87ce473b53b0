"""Messages that the server sends to the page while a prompt runs."""

from __future__ import annotations

import asyncio
import json
import struct
import threading
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any

CONNECT_SECONDS = 30
SETTLE_SECONDS = 0.2  # the last messages may still be in flight when the prompt is in the history
TEXT_FRAME = 3  # BinaryEventTypes.TEXT of ComfyUI's protocol.py


@dataclass(frozen=True)
class Event:
    """One websocket message: its type and its data."""

    kind: str
    data: dict[str, Any]


class Listener:
    """Collects websocket messages in a thread for the duration of a `with` block; read `.events`."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.events: list[Event] = []
        self._connected = threading.Event()
        self._error: BaseException | None = None
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="rig-events", daemon=True)

    def of(self, kind: str) -> list[dict[str, Any]]:
        """The data of all messages of one type, e.g. `progress_state`."""
        return [event.data for event in self.events if event.kind == kind]

    def progress_text(self) -> list[str]:
        """Every text that a node showed on itself, in order."""
        return [data["text"] for data in self.of("progress_text")]

    def wait_for(self, kind: str, timeout: float = 60.0) -> None:
        """Return at the first message of one type. Raises TimeoutError."""
        deadline = time.monotonic() + timeout
        while not self.of(kind):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.url}: no message {kind!r} in {timeout:.0f} s")
            time.sleep(0.02)

    def __enter__(self) -> Listener:
        self._thread.start()
        if not self._connected.wait(CONNECT_SECONDS) or self._error is not None:
            raise ConnectionError(f"{self.url}: no websocket") from self._error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._loop.call_soon_threadsafe(self._loop.call_later, SETTLE_SECONDS, self._stop.set)
        self._thread.join(CONNECT_SECONDS)

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._gather())
        except OSError as error:  # aiohttp's connection errors are OSErrors
            self._error = error
        finally:
            self._connected.set()
            self._loop.close()

    async def _gather(self) -> None:
        import aiohttp

        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(self.url, max_msg_size=0) as socket,
        ):
            self._connected.set()
            reader = asyncio.create_task(self._read(socket))
            await asyncio.wait(
                [reader, asyncio.create_task(self._stop.wait())],
                return_when=asyncio.FIRST_COMPLETED,
            )
            reader.cancel()

    async def _read(self, socket: Any) -> None:
        import aiohttp

        async for message in socket:
            if message.type == aiohttp.WSMsgType.TEXT:
                parsed = json.loads(message.data)
                self.events.append(Event(parsed["type"], parsed.get("data") or {}))
            elif message.type == aiohttp.WSMsgType.BINARY:
                self.events.append(_binary(message.data))


def _binary(frame: bytes) -> Event:
    """Progress texts are binary: type, length of the node id, node id, text."""
    (kind,) = struct.unpack_from(">I", frame)
    if kind != TEXT_FRAME:
        return Event("preview", {"type": kind, "bytes": len(frame) - 4})
    (length,) = struct.unpack_from(">I", frame, 4)
    node, text = frame[8 : 8 + length].decode(), frame[8 + length :].decode()
    return Event("progress_text", {"node": node, "text": text})
