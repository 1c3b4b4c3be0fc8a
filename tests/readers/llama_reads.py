"""What llama.cpp answers with an exported LoRA and merged model: `python llama_reads.py WORK OUT.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import xllamacpp


def server(model: Path, lora: Path | None = None) -> Any:
    """llama.cpp's server in this process, one thread, everything in fp32."""
    given = xllamacpp.CommonParams()
    given.model.path = str(model)
    given.n_ctx = 256
    given.n_parallel = 1
    given.cpuparams.n_threads = given.cpuparams_batch.n_threads = 1
    # Its defaults round keys and values to 16 bits.
    given.cache_type_k = given.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    given.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if lora is not None:
        adapter = xllamacpp.CommonAdapterLoraInfo()
        adapter.path, adapter.scale = str(lora), 1.0
        given.lora_adapters = [adapter]
    return xllamacpp.Server(given)


def answer(llama: Any, ids: list[int], asked: dict[str, Any], scale: float | None) -> dict[str, Any]:
    """Continue token ids greedily, with the logarithm of each token's probability."""
    request: dict[str, Any] = {"prompt": ids, "max_tokens": asked["new_tokens"], "temperature": 0, "logprobs": 1}
    if scale is not None:
        request["lora"] = [{"id": 0, "scale": scale}]
    choice = llama.handle_completions(request | {"cache_prompt": False})["choices"][0]
    content = [entry for entry in choice["logprobs"]["content"] if entry["id"] != asked["end"]]
    return {
        "tokens": [entry["id"] for entry in content],
        "text": choice["text"],
        "logprobs": [entry["logprob"] for entry in content],
    }


def main(work: Path, out: Path) -> None:
    asked = json.loads((work / "prompts.json").read_text())
    prompts = asked["prompts"]
    adapted = server(work / "base.gguf", work / "lora.gguf")
    runs = {"base": [answer(adapted, ids, asked, 0.0) for ids in prompts]}
    runs["lora"] = [answer(adapted, ids, asked, 1.0) for ids in prompts]
    del adapted
    merged = server(work / "merged.gguf")
    runs["merged"] = [answer(merged, ids, asked, None) for ids in prompts]
    out.write_text(json.dumps({"reader": f"xllamacpp {xllamacpp.__version__}", "runs": runs}, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute(), Path(sys.argv[2]))
