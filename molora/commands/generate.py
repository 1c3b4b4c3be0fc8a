"""`molora generate`: answer prompts with a trained adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from molora.base import ensure_pad_token, load_base
from molora.errors import ConfigError, Problem


def run(directory: str, prompts: list[str], *, max_new_tokens: int, temperature: float, base_model: str | None) -> int:
    """Print the answer to each prompt.

    Args:
        directory: Folder of the adapter.
        prompts: Questions; put through the chat template if the tokenizer has one.
        max_new_tokens: Longest answer.
        temperature: 0 takes the most probable token each time.
        base_model: Base model to use instead of the one named in the adapter.

    Raises:
        ConfigError: If there is no adapter in the folder, or its base model is not known.
    """
    config = read_adapter_config(directory)
    name = base_model or config.base_model_name_or_path
    if not name:
        raise ConfigError([Problem("base_model", f"{directory} does not name its base model; pass --base-model.")])
    base, tokenizer = load_base(name)
    model = PeftModel.from_pretrained(base, directory).eval()
    if (Path(directory) / "tokenizer_config.json").exists():
        # Saved with the adapter: the chat template it was trained with.
        tokenizer = AutoTokenizer.from_pretrained(directory)
        ensure_pad_token(tokenizer, base.config.get_text_config().vocab_size)
    for prompt in prompts:
        print(answer(model, tokenizer, prompt, max_new_tokens, temperature), flush=True)  # noqa: T201
    return 0


def read_adapter_config(directory: str) -> PeftConfig:
    """Read the config of an adapter folder.

    Raises:
        ConfigError: If the folder is missing or holds no PEFT adapter.
    """
    if not (Path(directory) / "adapter_config.json").is_file():
        what = "holds no adapter (no adapter_config.json)" if Path(directory).is_dir() else "is no folder"
        raise ConfigError(
            [Problem("DIR", f"{directory} {what}; give the output_dir of `molora train`.")], "no adapter"
        )
    return PeftConfig.from_pretrained(directory)


@torch.no_grad()
def answer(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, prompt: str, max_new_tokens: int, temperature: float
) -> str:
    """Continue one prompt and return only what is new."""
    messages = [{"role": "user", "content": prompt}]
    inputs: Any = (
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        if tokenizer.chat_template
        else tokenizer(prompt, return_tensors="pt")
    )
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    output = model.generate(
        **inputs.to(model.device), max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id, **sampling
    )
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()
