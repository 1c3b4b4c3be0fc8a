"""A server on the loopback device, started as a user starts it: `molora serve`."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from checks import Answer

START, STOP, ANSWER = 600, 90, 600
"""Seconds to wait, on a busy machine."""


class Refused(Exception):
    """The server said no.

    Args:
        code: Of HTTP.
        said: Its message.
    """

    def __init__(self, code: int, said: str) -> None:
        super().__init__(f"{code}: {said}")
        self.code, self.said = code, said


class Server:
    """Runs while the block does, and is ended by its process id.

    Args:
        base: Folder of the base model.
        adapters: Folders of what it serves from the start, by name.
        log: File for what it prints.
        options: Further words for `molora serve`.
    """

    def __init__(self, base: str, adapters: Mapping[str, str], log: Path, options: Sequence[str] = ()) -> None:
        self.base, self.log = Path(base).name, log
        self.port = _free_port()
        named = [f"{name}={folder}" for name, folder in adapters.items()]
        self.words = [
            *(str(Path(sys.executable).with_name("molora")), "serve", *named, "--base-model", base),
            *("--dtype", "float32", "--port", str(self.port), "--hot-load", *options),
            *("--", "--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "32", "--block-size", "32"),
            *("--max-num-batched-tokens", "512"),
        ]

    def __enter__(self) -> Server:
        with self.log.open("w") as output:
            # From a folder of its own, as a user does: that of a checkout may hold what older installs left behind.
            self.process = subprocess.Popen(
                self.words,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self.log.parent,
                env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"},  # GiB; enough, where others need memory too
            )
        began = time.monotonic()
        while not self._is_up():
            if self.process.poll() is not None or time.monotonic() - began > START:
                self.stop()
                raise AssertionError(f"the server did not start:\n{self.log.read_text()[-3000:]}")
            time.sleep(1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(STOP)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def ask(self, name: str, prompt: Sequence[int], tokens: int) -> Answer:
        """Continue token ids greedily."""
        body = {"model": name, "prompt": list(prompt), "max_tokens": tokens, "temperature": 0.0, "logprobs": 1}
        found = json.loads(self._http("completions", body | {"return_token_ids": True}))["choices"][0]
        return {"tokens": found["token_ids"], "logprobs": found["logprobs"]["token_logprobs"]}

    def load(self, name: str, folder: str | Path) -> None:
        self._http("load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})

    def unload(self, name: str) -> None:
        self._http("unload_lora_adapter", {"lora_name": name})

    def models(self) -> list[str]:
        return [model["id"] for model in json.loads(self._http("models"))["data"]]

    def worker_memory(self) -> int:
        """Bytes in memory of the largest process that the server has started, which holds the model."""
        return max(_resident(pid) for pid in _descendants(self.process.pid))

    def _is_up(self) -> bool:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=10).close()
        except OSError:
            return False
        return True

    def _http(self, what: str, body: Mapping[str, Any] | None = None) -> str:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/{what}",
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=ANSWER) as response:
                return str(response.read().decode())
        except urllib.error.HTTPError as error:
            raise Refused(error.code, error.read().decode(errors="replace")) from error


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _descendants(pid: int) -> list[int]:
    children = [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]
    return children + [below for child in children for below in _descendants(child)]


def _resident(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:")), 0)
