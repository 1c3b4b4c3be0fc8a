"""An engine of vLLM in a process of its own: a job from stdin, answers into a file.

It is run by its path and imports nothing of molora, so that the engine is as any program of a user makes it: whatever
serves the mixture came by way of vLLM's plug-ins.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

Answers = list[dict[str, Any]]


def answer(job: dict[str, Any]) -> dict[str, Answers]:
    """Start the engine and ask it: the base model alone, the adapter alone, and both in one batch.

    Args:
        job: Keyword arguments of the engine, the adapter's folder, prompts as token ids and the number of new tokens.
    """
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    engine = LLM(**job["engine"])
    sampling = SamplingParams(temperature=0.0, max_tokens=job["max_new_tokens"], logprobs=1)
    adapter = LoRARequest("adapter", 1, job["adapter"])
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]

    def ask(requests: list[tuple[Any, Any]]) -> Answers:
        inputs, adapters = [prompt for prompt, _ in requests], [which for _, which in requests]
        found = engine.generate(inputs, sampling, lora_request=adapters, use_tqdm=False)
        return [_plain(output.outputs[0]) for output in found]

    mixed = ask([(prompt, which) for prompt in prompts for which in (None, adapter)])
    return {
        "base": ask([(prompt, None) for prompt in prompts]),
        "adapter": ask([(prompt, adapter) for prompt in prompts]),
        "mixed_base": mixed[::2],
        "mixed_adapter": mixed[1::2],
    }


def _plain(output: Any) -> dict[str, Any]:
    tokens = list(output.token_ids)
    logprobs = [entry[token].logprob for token, entry in zip(tokens, output.logprobs, strict=True)]
    return {"tokens": tokens, "logprobs": logprobs}


def main() -> int:
    """Read the job, write the answers, or what went wrong."""
    out = Path(sys.argv[1])
    try:
        found: dict[str, Any] = answer(json.load(sys.stdin))
    except Exception as error:
        out.write_text(json.dumps({"error": f"{type(error).__name__}: {error}"}), encoding="utf-8")
        raise
    out.write_text(json.dumps(found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
