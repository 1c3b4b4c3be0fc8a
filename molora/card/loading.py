"""How an adapter is loaded, as a card says it."""

from __future__ import annotations

import re

from molora.base import PACKAGED
from molora.card.source import Source
from molora.config import MoLoraConfig
from molora.plan import routing_reads
from molora.shown import last_part

_HEADS = {"SEQ_CLS", "TOKEN_CLS"}
"""Tasks whose models have an output for each label."""

_HEAD = re.compile(r"(?:^|\.)(?:score|classifier)(?:\.(?P<inner>\w+))?\.weight$")
"""The weight of such a head, where PEFT saves it; some have several linears, the last of them `out_proj`."""

_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
}


def how_to_load(source: Source) -> list[str]:
    """Python, and the commands; DIR is where the files of the card lie."""
    config = source.config
    lines = ["`DIR` is the folder with these files.", "", "```python", *_python(source), "```", ""]
    if _name(config) != "CAUSAL_LM":
        return lines[:-1]
    commands = {
        f'molora generate DIR --prompt "..."{_options(config)}': "answers in the terminal",
        "molora serve DIR": "a server with vLLM",
        f"molora export DIR OUT --as lora{_fitted(source)}": "a plain LoRA, which needs no molora; see its --help",
    }
    width = max(map(len, commands))
    lines += ["```", *(f"{command:{width}}  # {what}" for command, what in commands.items()), "```"]
    if source.base is None:
        lines += ["", "The commands take the base model's name or folder as `--base-model` if they do not find it."]
    return lines


def _python(source: Source) -> list[str]:
    base = source.base or source.base_shown
    kind = _CLASSES.get(_name(source.config), "AutoModel")
    if base == PACKAGED:
        head = [
            "import molora  # lets PEFT load it",
            "from molora.base import load_base",
            "from peft import PeftModel",
        ]
        return [*head, "", f'base, tokenizer = load_base("{base}")', 'model = PeftModel.from_pretrained(base, "DIR")']
    where = f'"{base}"' if source.base else f'"{last_part(base)}"'
    tail = "" if source.base else "  # the base model's folder"
    return [
        "import molora  # lets PEFT load it",
        "from peft import PeftModel",
        f"from transformers import {kind}",
        "",
        f"base = {kind}.from_pretrained({where}{_labels(source)}){tail}",
        'model = PeftModel.from_pretrained(base, "DIR")',
    ]


def _labels(source: Source) -> str:
    """The number of labels, which the base model does not know; nothing if there is no head, or which is not clear."""
    if _name(source.config) not in _HEADS:
        return ""
    found = {
        match["inner"]: value.shape[0]
        for name, value in source.folder.adapter.tensors.items()
        if (match := _HEAD.search(name)) and value.ndim == 2
    }
    outputs = {found["out_proj"]} if "out_proj" in found else set(found.values())
    return f", num_labels={outputs.pop()}" if len(outputs) == 1 else ""


def _fitted(source: Source) -> str:
    """What the nearest LoRA is fitted to, for a mixture that none is equal to."""
    if not source.config.is_routed:
        return ""
    return " --calibrate" if source.datasets else " --calibrate FILE"


def _options(config: MoLoraConfig) -> str:
    reads = routing_reads(config)
    return (" --task TASK" if "task" in reads else "") + (' --scores "..."' if "scores" in reads else "")


def _name(config: MoLoraConfig) -> str:
    return str(getattr(config.task_type, "value", config.task_type) or "")
