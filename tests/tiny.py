"""Tiny seeded models and a character tokenizer, built in code so that no test needs a file or the network.

Every factory returns a fresh model in fp32 and evaluation mode; the same seed gives the same weights, and the global
random state is left as it was. Keyword arguments replace fields of the model's configuration.
"""

from __future__ import annotations

import string
from typing import Any, TypeVar

import torch
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

PAD, UNK, START, END = "<pad>", "<unk>", "<|im_start|>", "<|im_end|>"
CHARACTERS = "\n " + string.ascii_letters + string.digits + string.punctuation
VOCABULARY = {token: index for index, token in enumerate([PAD, UNK, START, END, *CHARACTERS])}
ModelT = TypeVar("ModelT", bound=PreTrainedModel)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_IDS = {"pad_token_id": VOCABULARY[PAD], "bos_token_id": None, "eos_token_id": VOCABULARY[END]}
DECODER = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    **SPECIAL_IDS,
}


def tiny_tokenizer(*, chat_template: bool = True) -> PreTrainedTokenizerFast:
    """One token a character of printable ASCII, ChatML markers as single tokens, 100 tokens in all.

    Saved beside a Llama, GPT-2 or T5 it reloads through `AutoTokenizer` as it was. Beside a Qwen2 it does not:
    transformers 5 replaces every tokenizer in a Qwen2 folder by `Qwen2Tokenizer`.
    """
    core = Tokenizer(WordLevel(VOCABULARY, unk_token=UNK))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        unk_token=UNK,
        eos_token=END,
        additional_special_tokens=[START],
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    if chat_template:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_llama(seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
    """Two-layer Llama with grouped-query attention."""
    return _seeded(LlamaForCausalLM, LlamaConfig(**(DECODER | overrides)), seed)


def tiny_qwen2(seed: int = 0, **overrides: Any) -> Qwen2ForCausalLM:
    """Two-layer Qwen2: biases in q, k and v, tied embeddings."""
    return _seeded(Qwen2ForCausalLM, Qwen2Config(**(DECODER | {"tie_word_embeddings": True} | overrides)), seed)


def tiny_gpt2(seed: int = 0, **overrides: Any) -> GPT2LMHeadModel:
    """Two-layer GPT-2: `Conv1D` layers instead of `nn.Linear`, fused q, k and v."""
    fields = {"vocab_size": len(VOCABULARY), "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
    return _seeded(GPT2LMHeadModel, GPT2Config(**(fields | SPECIAL_IDS | overrides)), seed)


def tiny_t5(seed: int = 0, **overrides: Any) -> T5ForConditionalGeneration:
    """T5 with two encoder and two decoder layers."""
    fields = {"vocab_size": len(VOCABULARY), "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    start = {"decoder_start_token_id": VOCABULARY[PAD]}
    return _seeded(T5ForConditionalGeneration, T5Config(**(fields | SPECIAL_IDS | start | overrides)), seed)


def tiny_bert_classifier(seed: int = 0, **overrides: Any) -> BertForSequenceClassification:
    """Two-layer BERT with a three-way classification head."""
    fields = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "num_labels": 3,
        "pad_token_id": VOCABULARY[PAD],
    }
    return _seeded(BertForSequenceClassification, BertConfig(**(fields | overrides)), seed)


def _seeded(kind: type[ModelT], config: PreTrainedConfig, seed: int) -> ModelT:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(config).eval()
