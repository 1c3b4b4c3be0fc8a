"""Every architecture that molora writes for llama.cpp, as llama.cpp's own converter and llama.cpp itself see it:
`python architectures.py CONVERTER WORK LLAMA_PYTHON [ARCHITECTURE...]`, where molora is installed.

For each a tiny random model with the tokenizer of WORK/base. Its adapter file must equal, bit by bit, what
`convert_lora_to_gguf.py` makes of the exported folder; and llama.cpp must answer with `convert_hf_to_gguf.py`'s model
and the adapter, and with the merged model, as transformers does with the adapter.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader
from peft_reads import answer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from molora.export.gguf import write_gguf_lora
from molora.export.gguf_model import write_gguf_model
from molora.gguf_names import ARCHITECTURES
from molora.plain.lora import PlainLora, write_lora

HERE = Path(__file__).parent
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FIELDS = {
    "gpt2": {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_ctx": 1024, "bos_token_id": 1, "eos_token_id": 2},
    # The converter reads what published configs have and transformers does not write.
    "cohere2": SIZES | {"rotary_pct": 1.0},
    # What llama.cpp takes it to be in models of this depth.
    "gemma3_text": SIZES | {"query_pre_attn_scalar": 16},
}
NEW_TOKENS = 8

TRANSPOSED = {"gpt2"}
"""Where the converter turns the factors round together with GPT-2's `Conv1D` weights, which llama.cpp then refuses."""

OTHER_TOKENIZER = {"gemma", "gemma2", "glm4", "nemotron", "phi3"}
"""Where the converter of models wants another kind of tokenizer than SmolLM2's: only the adapter file is compared."""


def tiny(kind: str, vocabulary: int) -> Any:
    config = AutoConfig.for_model(kind, vocab_size=vocabulary, **FIELDS.get(kind, SIZES))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    for parameter in model.parameters():
        # Far from uniform answers, and norms and biases that a mix-up would show in.
        parameter.data = torch.randn_like(parameter) * 0.15 if parameter.dim() > 1 else parameter.data + 0.1
    return model


def random_lora(model: nn.Module) -> PlainLora:
    factors = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and name != "lm_head":
            out, width = module.weight.shape if isinstance(module, nn.Linear) else reversed(module.weight.shape)
            factors[name] = (torch.randn(3, width) * 0.1, torch.randn(out, 3) * 0.3)
    return PlainLora(factors, fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()))


def run(*command: Any) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[1]}: {(done.stdout + done.stderr).strip()[-500:]}")


def same_adapter(ours: Path, theirs: Path) -> bool:
    one, other = ({t.name: t.data for t in GGUFReader(file).tensors} for file in (ours, theirs))
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def check(kind: str, scripts: Path, work: Path, llama: str) -> None:
    """Raise unless the converter and llama.cpp agree with molora."""
    folder = work / kind
    (folder / "lora").mkdir(parents=True)
    tokenizer = AutoTokenizer.from_pretrained(work / "base")
    model = tiny(kind, len(tokenizer))
    model.save_pretrained(folder / "base")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(work / "base" / name, folder / "base")
    if kind == "qwen2":
        # transformers replaces every tokenizer in a Qwen2 folder; the converter goes by `architectures`.
        config = json.loads((folder / "base" / "config.json").read_text())
        (folder / "base" / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    lora = random_lora(model)
    names = [name for name, _ in model.named_modules()]
    write_lora(lora, folder / "lora", base_model=str(folder / "base"), modules=names, task_type="CAUSAL_LM")
    write_gguf_lora(lora, folder / "lora.gguf", base_config=model.config)
    convert = [sys.executable, scripts / "convert_lora_to_gguf.py", folder / "lora", "--base", folder / "base"]
    run(*convert, "--outfile", folder / "theirs.gguf")
    if same_adapter(folder / "lora.gguf", folder / "theirs.gguf") == (kind in TRANSPOSED):
        raise RuntimeError("the adapter file is not what the converter makes")
    if kind not in OTHER_TOKENIZER:
        answers(kind, scripts, work, llama, model, lora)


def answers(kind: str, scripts: Path, work: Path, llama: str, model: Any, lora: PlainLora) -> None:
    """Let llama.cpp answer, beside and merged, and compare with transformers."""
    folder = work / kind
    convert = [sys.executable, scripts / "convert_hf_to_gguf.py", folder / "base", "--outtype", "f32"]
    run(*convert, "--outfile", folder / "base.gguf")
    weights = {name: model.get_submodule(name).weight.detach().clone() for name in lora.factors}
    merged, template = folder / "merged.gguf", folder / "base.gguf"
    write_gguf_model(lora, merged, template=template, base_config=model.config, weights=weights.__getitem__)
    tokenizer = AutoTokenizer.from_pretrained(work / "base")
    asked = json.loads((work / "prompts.json").read_text()) | {"new_tokens": NEW_TOKENS}
    runs = {"base": [answer(model, tokenizer, ids, asked) for ids in asked["prompts"]]}
    for name, (a, b) in lora.factors.items():
        model.get_submodule(name).weight.data += (b @ a).T if lora.fan_in_fan_out else b @ a
    runs["lora"] = [answer(model, tokenizer, ids, asked) for ids in asked["prompts"]]
    # llama.cpp's server gives no probabilities of tokens that are a part of a character.
    whole = [
        at
        for at in range(len(asked["prompts"]))
        if not any("\ufffd" in tokenizer.decode([token]) for found in runs.values() for token in found[at]["tokens"])
    ]
    if len(whole) < 2:
        raise RuntimeError("a random model answered with parts of characters only; take another seed")
    runs = {name: [found[at] for at in whole] for name, found in runs.items()}
    runs["merged"] = runs["lora"]
    asked["prompts"] = [asked["prompts"][at] for at in whole]
    (folder / "prompts.json").write_text(json.dumps(asked))
    (folder / "torch.json").write_text(json.dumps({"reader": "transformers", "runs": runs}))
    run(llama, HERE / "llama_reads.py", folder, folder / "llama.json")
    run(sys.executable, HERE / "compare.py", folder / "torch.json", folder / "llama.json")


def main(scripts: Path, work: Path, llama: str, kinds: list[str]) -> bool:
    good = True
    for kind in kinds or ARCHITECTURES:
        try:
            check(kind, scripts, work, llama)
            print(f"ok   {kind}", flush=True)  # noqa: T201
        except (RuntimeError, ValueError) as error:
            good = False
            print(f"FAIL {kind}: {error}", flush=True)  # noqa: T201
    return good


if __name__ == "__main__":
    found = next(Path(sys.argv[1]).rglob("convert_lora_to_gguf.py")).parent
    sys.exit(0 if main(found, Path(sys.argv[2]).absolute(), sys.argv[3], sys.argv[4:]) else 1)
