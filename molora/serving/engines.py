"""Ask vLLM: an engine that is started for it, or a server that runs already."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molora.errors import ConfigError, MoloraError, Problem, did_you_mean
from molora.serving import engine_process
from molora.serving.comparison import Answer

GROUPS = {
    "base": "base, alone",
    "adapter": "adapter, alone",
    "mixed_base": "base, in one batch",
    "mixed_adapter": "adapter, in one batch",
}
"""What is asked for: each alone, and both in one batch, as a server has them."""

Served = Mapping[str, Sequence[Answer]]
"""Answers to every prompt, by group."""

_SECONDS = 600
_SHOWN = 5


@dataclass(frozen=True)
class Job:
    """What to ask.

    Attributes:
        base: The base model, as a folder or a name on the hub.
        adapter: Folder of the adapter.
        prompts: Token ids of each prompt.
        max_new_tokens: Longest answer.
        dtype: Precision, as torch calls it.
        max_lora_rank: Room for the adapter.
        tensor_parallel_size: Processes that share the model.
    """

    base: str
    adapter: str
    prompts: Sequence[Sequence[int]]
    max_new_tokens: int
    dtype: str = "float32"
    max_lora_rank: int = 16
    tensor_parallel_size: int = 1

    def engine(self) -> dict[str, Any]:
        """Arguments of vLLM's engine: small, and without what would let it answer from memory."""
        longest = max(map(len, self.prompts)) + self.max_new_tokens
        return {
            "model": self.base,
            "dtype": self.dtype,
            "tensor_parallel_size": self.tensor_parallel_size,
            "enable_lora": True,
            "max_loras": 1,
            "max_lora_rank": self.max_lora_rank,
            "max_model_len": longest,
            "max_num_seqs": 2 * len(self.prompts),
            "max_num_batched_tokens": max(longest, 512),
            "enforce_eager": True,
            # Else the mixed batch would read what the batches before it left, and hardly compute.
            "enable_prefix_caching": False,
        }


def ask_engine(job: Job, environment: Mapping[str, str]) -> Served:
    """Start an engine in a process of its own, whose memory is free again when this returns.

    Args:
        job: What to ask.
        environment: Variables to set beside those that are.

    Raises:
        MoloraError: If vLLM cannot load the adapter or does not start, with what it said.
    """
    task = {
        "engine": job.engine(),
        "adapter": job.adapter,
        "prompts": [list(ids) for ids in job.prompts],
        "max_new_tokens": job.max_new_tokens,
    }
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder) / "answers.json", Path(folder) / "log"
        with log.open("w") as output:
            code = subprocess.run(
                # -P: the folder of the script is no place to import from.
                [sys.executable, "-P", engine_process.__file__, str(out)],
                input=json.dumps(task),
                text=True,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", **environment},
            ).returncode
        found = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {}
        if code or "error" in found:
            raise MoloraError(_failure(code, found, log.read_text(encoding="utf-8", errors="replace")))
    return {group: [Answer(**answer) for answer in found[group]] for group in GROUPS}


def ask_server(url: str, job: Job, base: str, adapter: str) -> Served:
    """Ask a running server.

    Args:
        url: Where it is, such as `http://127.0.0.1:8000`.
        job: What to ask.
        base: What it calls the base model.
        adapter: What it calls the adapter.

    Raises:
        MoloraError: If it cannot be reached or refuses.
    """

    def ask(name: str) -> list[Answer]:
        body = {
            "model": name,
            "prompt": [list(ids) for ids in job.prompts],
            "max_tokens": job.max_new_tokens,
            "temperature": 0.0,
            "repetition_penalty": 1.0,  # a model's own defaults are not wanted here
            "logprobs": 1,
            "return_token_ids": True,
            "cache_salt": uuid.uuid4().hex,  # or it would answer from memory
        }
        choices = _http(f"{_root(url)}/v1/completions", body)["choices"]
        try:
            return [
                Answer(choice["token_ids"], choice["logprobs"]["token_logprobs"])
                for choice in sorted(choices, key=lambda choice: choice["index"])
            ]
        except (KeyError, TypeError) as error:
            raise MoloraError(f"{url} does not answer as vLLM's server does: {error!r} is missing.") from error

    with ThreadPoolExecutor(2) as pool:
        together = [pool.submit(ask, name) for name in (base, adapter)]
        mixed_base, mixed_adapter = (one.result() for one in together)
    return {"base": ask(base), "adapter": ask(adapter), "mixed_base": mixed_base, "mixed_adapter": mixed_adapter}


def server_models(url: str) -> list[dict[str, Any]]:
    """The models of a server.

    Raises:
        MoloraError: If it cannot be reached.
    """
    found: list[dict[str, Any]] = _http(f"{_root(url)}/v1/models")["data"]
    return found


def names_on_server(models: Sequence[Mapping[str, Any]], folder: str, name: str | None) -> tuple[str, str]:
    """What a server calls the base model and an adapter.

    Args:
        models: As it lists them.
        folder: Folder of the adapter.
        name: The adapter's name, if the user says it.

    Raises:
        ConfigError: If it does not serve the adapter, or serves several and none of this folder.
    """
    bases = [str(model["id"]) for model in models if not model.get("parent")]
    adapters = {str(model["id"]): str(model.get("root") or "") for model in models if model.get("parent")}
    at = Path(folder).expanduser().absolute()
    same = [key for key, root in adapters.items() if root and Path(root).absolute() == at]
    chosen = name if name is not None else next(iter([*same, *([at.name] if at.name in adapters else [])]), None)
    if not bases or chosen not in adapters:
        listed = ", ".join(adapters) or "none"
        said = f"there is no adapter {name!r}" if name is not None else f"none of its adapters comes from {folder}"
        hint = did_you_mean(name, adapters) if name is not None else " Give --name if one is a copy of it."
        raise ConfigError([Problem("--name", f"{said}; the server has: {listed}.{hint}")], "cannot ask the server")
    return bases[0], chosen


def _root(url: str) -> str:
    root = url.rstrip("/").removesuffix("/v1")
    if not root.startswith(("http://", "https://")):
        raise ConfigError(
            [Problem("--url", f"got {url!r}; give one such as http://127.0.0.1:8000.")], "no such server"
        )
    return root


def _http(url: str, body: Mapping[str, Any] | None = None) -> Any:
    request = urllib.request.Request(
        url,
        data=None if body is None else json.dumps(body).encode(),
        headers={"Content-Type": "application/json", **_authorization()},
    )
    try:
        with urllib.request.urlopen(request, timeout=_SECONDS) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        said = error.read().decode(errors="replace").strip()
        raise MoloraError(f"{url} refuses with {error.code}: {said or error.reason}") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise MoloraError(f"{url} cannot be asked: {reason}. Is the server up, and is this its address?") from error


def _authorization() -> dict[str, str]:
    """For servers that ask for a key."""
    key = os.environ.get("VLLM_API_KEY") or os.environ.get("OPENAI_API_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}


def _failure(code: int, found: Mapping[str, Any], log: str) -> str:
    """What to say of an engine that failed: its error, and what its processes said about theirs."""
    lines = [line.strip() for line in log.splitlines() if "Error" in line and "raise " not in line]
    told = list(dict.fromkeys(lines))[-_SHOWN:] if "error" not in found or "core" in found["error"] else []
    said = found.get("error") or f"its process ended with exit code {code}"
    return "\n  ".join([f"vLLM could not be asked: {said}", *told])
