"""A real ComfyUI server, headless, on its own port and in its own base directory."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from rig.base import link, prepare, write_model_paths
from rig.client import Client
from rig.environment import child_environment
from rig.tree import comfy_tree

HOST = "127.0.0.1"
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
STOP_SECONDS = 15
if sys.platform == "win32":
    NEW_GROUP, STOP = subprocess.CREATE_NEW_PROCESS_GROUP, signal.CTRL_BREAK_EVENT
else:
    NEW_GROUP, STOP = 0, signal.SIGINT


class ServerError(RuntimeError):
    """The server did not start, or died; the message ends with the last lines of its log."""


class ComfyServer:
    """Runs for the duration of a `with` block; answers at `.url`, is driven through `.client`.

    packs     custom node folders in addition to ours, which is always there
    models    folder laid out like ComfyUI's `models/`, searched in addition to the server's own
    base      base directory; None: a temporary one that is deleted at the end
    cpu       False lets ComfyUI choose the device
    args      further arguments of ComfyUI's main.py
    threads   CPU threads of torch (OMP_NUM_THREADS); None: torch decides
    env       further environment variables
    timeout   seconds until the server must answer
    """

    def __init__(
        self,
        packs: Sequence[Path] = (),
        models: Path | None = None,
        *,
        base: Path | None = None,
        tree: Path | None = None,
        cpu: bool = True,
        args: Sequence[str] = (),
        threads: int | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float = 240.0,
    ) -> None:
        self.tree = tree or comfy_tree()
        self._temporary = base is None
        self.base = Path(base or tempfile.mkdtemp(prefix="hswq-comfy-")).resolve()
        prepare(self.base, packs)
        self.args = [*(["--cpu"] if cpu else []), *args]
        if models is not None:
            paths = write_model_paths(self.base, models)
            self.args += ["--extra-model-paths-config", str(paths)]
        self.threads, self.env, self.timeout = threads, env, timeout
        self.log_path = self.base / "server.log"
        self.port = _free_port()
        self.url = f"http://{HOST}:{self.port}"
        self.client = Client(self.url)
        self.process: subprocess.Popen[bytes] | None = None
        self.start_seconds = float("nan")

    # ----- life

    def start(self) -> ComfyServer:
        """Start the server and wait until it answers. Raises ServerError."""
        if self.process is not None:
            raise ServerError(f"{self.url}: already running, use restart()")
        begin = time.monotonic()
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                self._command(),
                cwd=self.tree,
                env=child_environment(self.threads, self.env),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                creationflags=NEW_GROUP,
            )
        try:
            self._wait(begin + self.timeout)
        except BaseException:  # Ctrl-C too: never leave the process behind
            self.stop()
            raise
        self.start_seconds = time.monotonic() - begin
        return self

    def stop(self) -> None:
        """Ask the server to stop, then force it; the base directory stays."""
        process, self.process = self.process, None
        if process is None or process.poll() is not None:
            return
        process.send_signal(STOP)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def restart(self) -> ComfyServer:
        """Start a new process with the same base directory and port: only what is on disk survives."""
        self.stop()
        return self.start()

    def __enter__(self) -> ComfyServer:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
        if self._temporary:
            shutil.rmtree(self.base, ignore_errors=True)

    # ----- folders

    @property
    def output(self) -> Path:
        """ComfyUI's output folder."""
        return self.base / "output"

    def add_model(self, kind: str, file: Path, name: str | None = None) -> str:
        """Make `file` appear in the model folder `kind` (checkpoints, vae, ...); returns its name there."""
        name = name or file.name
        link(file.resolve(), self.base / "models" / kind / name)
        return name

    # ----- log

    def log(self) -> str:
        """The server's whole log, across all restarts."""
        return COLOUR.sub("", self.log_path.read_text(encoding="utf-8", errors="replace"))

    def tail(self, lines: int = 40) -> str:
        """The last lines of the log."""
        return "\n".join(self.log().splitlines()[-lines:])

    # ----- inside

    def _command(self) -> list[str]:
        command = [sys.executable, "main.py", "--listen", HOST, "--port", str(self.port)]
        # The database does not use the base directory, so it is kept in memory.
        command += ["--base-directory", str(self.base), "--database-url", "sqlite:///:memory:"]
        return [*command, "--disable-auto-launch", "--disable-api-nodes", *self.args]

    def _wait(self, deadline: float) -> None:
        while time.monotonic() < deadline:
            if self.process is None or self.process.poll() is not None:
                raise ServerError(f"ComfyUI ended while starting:\n{self.tail()}")
            if self._answers():
                return
            time.sleep(0.1)
        raise ServerError(f"no answer from {self.url} in {self.timeout:.0f} s:\n{self.tail()}")

    def _answers(self) -> bool:
        """Whether this server answers, and not another process that has taken the port meanwhile."""
        try:
            with urllib.request.urlopen(self.url + "/system_stats", timeout=2) as reply:  # noqa: S310 - our own
                argv = json.load(reply)["system"]["argv"]
        except (OSError, ValueError):
            return False
        if str(self.base) not in argv:
            raise ServerError(f"{self.url}: taken by another ComfyUI, {argv}; start again")
        return True


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])
