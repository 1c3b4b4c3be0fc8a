"""What stock PEFT answers with an exported LoRA: `python peft_reads.py WORK OUT.json`, where molora is missing."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import peft
import torch
import transformers


def answer(model: Any, tokenizer: Any, ids: list[int], asked: dict[str, Any]) -> dict[str, Any]:
    """Continue token ids greedily, with the logarithm of each token's probability."""
    out = model.generate(
        input_ids=torch.tensor([ids]),
        do_sample=False,
        max_new_tokens=asked["new_tokens"],
        eos_token_id=asked["end"],
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
    )
    tokens = out.sequences[0, len(ids) :].tolist()
    logits = torch.cat(out.logits)
    logprobs = logits.double().log_softmax(-1)
    chosen = [float(row[token]) for row, token in zip(logprobs, tokens, strict=True)]
    if tokens[-1] == asked["end"]:
        tokens, chosen = tokens[:-1], chosen[:-1]
    return {"tokens": tokens, "text": tokenizer.decode(tokens), "logprobs": chosen}


def main(work: Path, out: Path) -> None:
    assert importlib.util.find_spec("molora") is None, "molora is installed here, which proves nothing"
    torch.set_num_threads(1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(work / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(work / "base", dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, work / "lora").eval()
    asked = json.loads((work / "prompts.json").read_text())
    prompts = asked["prompts"]
    runs: dict[str, list[Any]] = {"lora": [answer(model, tokenizer, ids, asked) for ids in prompts]}
    with model.disable_adapter():
        runs["base"] = [answer(model, tokenizer, ids, asked) for ids in prompts]
    merged = model.merge_and_unload()
    runs["merged"] = [answer(merged, tokenizer, ids, asked) for ids in prompts]
    version = f"peft {peft.__version__}, transformers {transformers.__version__}"
    out.write_text(json.dumps({"reader": version, "runs": runs}, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute(), Path(sys.argv[2]))
