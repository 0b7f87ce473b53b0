"""Client for the ComfyUI HTTP API, using the standard library; Listener needs aiohttp (ComfyUI has it)."""

# ruff: noqa: S310 - every URL here is that of our own server

from __future__ import annotations

import json
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rig.events import Listener

Prompt = dict[str, dict[str, Any]]
FAILURES = ("execution_error", "execution_interrupted")


class ClientError(RuntimeError):
    """The server gave an answer that none of our requests should get."""


@dataclass(frozen=True)
class Result:
    """The outcome of one prompt.

    status    success · error · interrupted · rejected
    outputs   what each node showed (images, text, ...), by node id
    errors    error messages; if rejected: validation errors by node id
    cached    ids of nodes that did not run because nothing had changed
    seconds   from submitting to the entry in the history
    """

    status: str
    outputs: dict[str, Any] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    node_errors: dict[str, Any] = field(default_factory=dict)
    cached: frozenset[str] = frozenset()
    prompt_id: str | None = None
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether every node ran."""
        return self.status == "success"

    def check(self) -> Result:
        """Return self on success; otherwise raise ClientError with every message."""
        if not self.ok:
            raise ClientError(f"prompt {self.status}: " + "; ".join(self.errors))
        return self

    def images(self) -> list[dict[str, str]]:
        """filename, subfolder and type of every picture shown, in node order."""
        return [image for shown in self.outputs.values() for image in shown.get("images", [])]

    def text(self) -> list[str]:
        """Every text shown, in node order."""
        return [line for shown in self.outputs.values() for line in shown.get("text", [])]


class Client:
    """One user of the server at `url` (http://host:port)."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.id = uuid.uuid4().hex

    def run(self, prompt: Prompt, timeout: float = 600.0) -> Result:
        """Queue an API-format prompt and wait until it ends. Raises TimeoutError."""
        begin = time.monotonic()
        queued = self.submit(prompt)
        if isinstance(queued, Result):
            return queued
        return self.wait(queued, timeout, begin)

    def submit(self, prompt: Prompt) -> str | Result:
        """Queue a prompt: its id, or the Result `rejected`."""
        code, reply = self._call("/prompt", {"prompt": prompt, "client_id": self.id})
        if code == 200:
            return str(reply["prompt_id"])
        if "error" not in reply:
            raise ClientError(f"{self.url}/prompt: HTTP {code}, {reply}")
        return _rejected(reply)

    def wait(self, prompt_id: str, timeout: float = 600.0, begin: float | None = None) -> Result:
        """Wait until a queued prompt has ended. Raises TimeoutError."""
        begin = time.monotonic() if begin is None else begin
        while time.monotonic() - begin < timeout:
            entry = self.get(f"/history/{prompt_id}").get(prompt_id)
            if entry:
                return _result(prompt_id, entry, time.monotonic() - begin)
            time.sleep(0.05)
        raise TimeoutError(f"prompt {prompt_id}: no end after {timeout:.0f} s")

    def interrupt(self) -> None:
        """Do what the page's Cancel button does."""
        self._call("/interrupt", {})

    def free(self) -> None:
        """Ask the server to unload all models and forget all cached node results.

        The server does so before its next prompt, or within a second when idle.
        """
        self._call("/free", {"unload_models": True, "free_memory": True})

    def object_info(self) -> dict[str, Any]:
        """Every node's inputs and outputs, by node id."""
        return dict(self.get("/object_info"))

    def view(self, image: dict[str, str]) -> bytes:
        """The bytes of a picture that a Result names."""
        query = "&".join(f"{key}={urllib.parse.quote(image[key])}" for key in image)
        with urllib.request.urlopen(f"{self.url}/view?{query}", timeout=60) as reply:
            return bytes(reply.read())

    @contextmanager
    def listen(self) -> Iterator[Listener]:
        """Within the block, collect the websocket messages that the page would get."""
        with Listener(f"ws{self.url[4:]}/ws?clientId={self.id}") as listener:
            yield listener

    def get(self, path: str) -> Any:
        """The JSON answer to GET `path`. Raises ClientError unless the answer is 200."""
        code, reply = self._call(path)
        if code != 200:
            raise ClientError(f"{self.url}{path}: HTTP {code}, {reply}")
        return reply

    def _call(self, path: str, data: Any = None) -> tuple[int, Any]:
        body = None if data is None else json.dumps(data).encode()
        head = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, data=body, headers=head)
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                return reply.status, _json(reply.read())
        except urllib.error.HTTPError as error:
            return error.code, _json(error.read())


def _json(raw: bytes) -> Any:
    try:
        return json.loads(raw) if raw else {}
    except ValueError:
        return {"body": raw[:2000].decode(errors="replace")}


def _rejected(reply: dict[str, Any]) -> Result:
    per_node = reply.get("node_errors") or {}
    errors = [
        f"node {node} ({found['class_type']}): {error['message']}: {error['details']}"
        for node, found in per_node.items()
        for error in found["errors"]
    ]
    return Result("rejected", errors=errors or [str(reply["error"])], node_errors=per_node)


def _result(prompt_id: str, entry: dict[str, Any], seconds: float) -> Result:
    messages = entry["status"]["messages"]
    failures = [(kind, data) for kind, data in messages if kind in FAILURES]
    status = entry["status"]["status_str"]
    if any(kind == "execution_interrupted" for kind, _ in failures):
        status = "interrupted"
    cached = [node for kind, data in messages if kind == "execution_cached" for node in data["nodes"]]
    return Result(
        status,
        outputs=entry["outputs"],
        errors=[_message(data) for _, data in failures],
        cached=frozenset(cached),
        prompt_id=prompt_id,
        seconds=seconds,
    )


def _message(data: dict[str, Any]) -> str:
    where = f"node {data.get('node_id')} ({data.get('node_type')})"
    if "exception_message" not in data:
        return f"{where}: interrupted"
    return f"{where}: {data['exception_type']}: {data['exception_message'].strip()}"
