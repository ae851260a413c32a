"""A ComfyUI server of our own: a free loopback port, its own base directory, stopped by its process id."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
#: Seconds that a graph, and an answer of the server, may take at most, on a machine that is busy with other things.
PATIENCE, ANSWER = 600.0, 120.0


class PromptError(RuntimeError):
    """The server refused a graph, or a node of it failed."""


def free_port() -> int:
    """A loopback port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """ComfyUI with this pack in its custom_nodes, on the CPU."""

    def __init__(self, base: Path, host: Path | None = None) -> None:
        self.base, self.port, self.client = base, free_port(), uuid.uuid4().hex
        self.host = host or Path(os.environ["COMFYUI_PATH"])
        for name in ("custom_nodes", "input", "output", "models/diffusion_models"):
            (base / name).mkdir(parents=True, exist_ok=True)
        (base / "custom_nodes" / "ParaTAFusion").symlink_to(REPOSITORY, target_is_directory=True)
        self.log = base / "server.log"
        self._process: subprocess.Popen | None = None

    def start(self, patience: float = PATIENCE) -> None:
        """Start, and wait until it answers.

        Raises:
            RuntimeError: it does not come up; the end of its log is in the message.
        """
        command = [sys.executable, "main.py", "--cpu", "--listen", "127.0.0.1", "--port", str(self.port)]
        command += ["--base-directory", str(self.base), "--disable-auto-launch"]
        command += ["--database-url", f"sqlite:///{self.base / 'db.sqlite'}", "--preview-method", "none"]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                command, cwd=self.host, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
        end = time.monotonic() + patience
        while time.monotonic() < end and self._process.poll() is None:
            try:
                self.get("/system_stats")
                return
            except OSError:  # refused, cut off or too late
                time.sleep(0.3)
        tail = self.text()[-3000:]
        self.stop()
        raise RuntimeError(f"the server did not come up:\n{tail}")

    def stop(self) -> None:
        """End this server, and no other process."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._process = None

    def text(self) -> str:
        """The log so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    @property
    def pid(self) -> int:
        """The server's process id."""
        assert self._process is not None
        return self._process.pid

    def get(self, path: str) -> Any:
        """JSON of a GET."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=ANSWER) as answer:
            return json.loads(answer.read() or b"null")

    def post(self, path: str, body: Any) -> Any:
        """JSON of a POST.

        Raises:
            PromptError: the server refused it; its own words are in the message.
        """
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=ANSWER) as answer:
                return json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as error:
            raise PromptError(error.read().decode(errors="replace")) from None

    def queue(self, graph: dict[str, Any], client: str | None = None) -> str:
        """Queue a graph in API form, as our client or another one; returns its id."""
        return self.post("/prompt", {"prompt": graph, "client_id": client or self.client})["prompt_id"]

    def wait(self, prompt_id: str, patience: float = PATIENCE) -> dict[str, Any]:
        """The history entry of a graph that has ended, however it ended."""
        end = time.monotonic() + patience
        while time.monotonic() < end:
            entry = self.get(f"/history/{prompt_id}").get(prompt_id)
            if entry is not None:
                return entry
            time.sleep(0.05)
        raise PromptError(f"graph {prompt_id} has not ended:\n{self.text()[-2000:]}")

    def run(self, graph: dict[str, Any], client: str | None = None) -> dict[str, Any]:
        """Run a graph to its end; returns its history entry.

        Raises:
            PromptError: it was refused or failed; the failing node's words are in the message.
        """
        entry = self.wait(self.queue(graph, client))
        if entry["status"]["status_str"] != "success":
            failed = [m[1] for m in entry["status"]["messages"] if m[0] == "execution_error"]
            raise PromptError(failed[0]["exception_message"] if failed else str(entry["status"]["messages"]))
        return entry

    def images(self, entry: dict[str, Any]) -> dict[str, Path]:
        """The saved PNG of each SaveImage node of a run."""
        found = {}
        for node, output in entry["outputs"].items():
            for image in output.get("images", []):
                if image["type"] == "output":
                    found[node] = self.base / "output" / image["subfolder"] / image["filename"]
        return found

    def cached(self, entry: dict[str, Any]) -> set[str]:
        """The nodes of a run whose outputs came from the cache."""
        return {n for kind, m in entry["status"]["messages"] if kind == "execution_cached" for n in m["nodes"]}

    def imported(self) -> bool:
        """Whether the pack was imported without a complaint."""
        text = self.text()
        return not re.search(r"IMPORT FAILED.*ParaTAFusion|Cannot import .*ParaTAFusion", text)
