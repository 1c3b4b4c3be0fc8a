"""An engine of vLLM, as a program of a user has it: `python engine.py JOB.json OUT.json`. Nothing here imports molora.

The job has `engine`, the engine's keyword arguments; `adapters`, folders by name; `prompts`, token ids; `new_tokens`;
and `rounds`, each a batch of pairs of an adapter's name, or `base`, and the number of a prompt. Out come `rounds`, the
answers, and `cached`, how many tokens of prompts each round took from the prefix cache; or `error`, what vLLM said.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def answer(job: Mapping[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    engine = LLM(**job["engine"])
    assert "molora" not in sys.modules, "the plug-in imports molora before there is a mixture"
    requests = {
        name: LoRARequest(name, number, path) for number, (name, path) in enumerate(job["adapters"].items(), 1)
    }
    sampling = SamplingParams(temperature=0.0, max_tokens=job["new_tokens"], logprobs=1)
    rounds, cached = [], []
    for batch in job["rounds"]:
        outputs = engine.generate(
            [{"prompt_token_ids": job["prompts"][prompt]} for _, prompt in batch],
            sampling,
            lora_request=[requests.get(name) for name, _ in batch],
            use_tqdm=False,
        )
        rounds.append([_plain(output.outputs[0]) for output in outputs])
        cached.append(sum(output.num_cached_tokens or 0 for output in outputs))
    return {"rounds": rounds, "cached": cached}


def _plain(output: Any) -> dict[str, Any]:
    tokens = list(output.token_ids)
    return {
        "tokens": tokens,
        "logprobs": [entry[token].logprob for token, entry in zip(tokens, output.logprobs, strict=True)],
    }


def main() -> None:
    try:
        found = answer(json.loads(Path(sys.argv[1]).read_text()))
    except Exception as error:
        Path(sys.argv[2]).write_text(json.dumps({"error": f"{type(error).__name__}: {error}"}))
        raise
    Path(sys.argv[2]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
