"""`molora generate`: answer prompts with a trained adapter."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from molora.adapters import read_adapter_config, read_adapter_tensors
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
    # PEFT asks transformers by an old name; nothing a user of this command could change.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
    config = read_adapter_config(directory)
    read_adapter_tensors(directory)  # a damaged file is better found before the base model is loaded
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
