"""A page for each preset, from its docstring, its fields, its run file and what molora says when asked about it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from generators.markdown import block, capital, code, page, paragraph, table
from generators.reference import meaning
from molora.config import MoLoraConfig
from molora.plain.fixed import Fixed
from molora.plan import ModulePlan, plan_module
from molora.presets import METHODS, PRESETS, preset_fields
from molora.runfile import keys
from molora.serving.refusals import why_not, why_not_module

DOCS = Path(__file__).parent.parent
RUN_FILES = DOCS.parent / "configs" / "methods"
WHEN = DOCS / "when_to_use.yaml"
MODULE = "model.layers.0.mlp.up_proj"
"""A module that every preset can adapt."""

COMPOSED = METHODS["composed from trained LoRAs"]
_NEEDS = {"task": "`task_ids`", "scores": "`expert_scores`"}
_TURNS = re.compile(r"\b(?=Differs (?:from|in) |Differs: |Unverified, )")
_TITLES = {"Differs": "What differs from the authors", "Unverified": "What could not be verified"}
"""Words that begin a part of a docstring, and the heading it gets."""


@dataclass(frozen=True)
class Facts:
    """What the code knows about a preset with its own defaults.

    Attributes:
        summary: The first sentence of its docstring.
        text: The paragraphs behind it.
        papers: Their numbers on arXiv.
        needs: What a call must be given besides tokens.
        merges: How it merges into the base model.
        refusal: Why vLLM cannot serve it; `None` if it can.
    """

    summary: str
    text: list[str]
    papers: list[str]
    needs: list[str]
    merges: str
    refusal: str | None


def facts_of(name: str) -> Facts:
    """Read a preset's docstring, and ask the rest of molora about it."""
    config = MoLoraConfig.from_preset(name)
    plan = plan_module(config, MODULE, 4)
    summary, *text = (inspect.getdoc(PRESETS[name]) or "").split("\n\n")
    whole = "\n\n".join(text)
    papers = [] if "From no paper" in whole else sorted(set(re.findall(r"arXiv (\d{4}\.\d{4,5})", whole)))
    return Facts(
        " ".join(summary.split()),
        text,
        papers,
        [words for kind, words in _NEEDS.items() if kind in plan.reads],
        merging(config, plan),
        why_not(config) or why_not_module(config, plan),
    )


def merging(config: MoLoraConfig, plan: ModulePlan) -> str:
    """How a preset merges into its base model."""
    if config.expert_scope == "block":
        return "no: experts stand beside whole blocks"
    if not config.is_routed:
        return "exactly"
    ways = {
        "exactly for one task": Fixed(task=0),
        "exactly for given scores": Fixed(expert_scores=(0.0,)),
        "exactly for what follows one prompt": Fixed(prompt=torch.zeros(1, 1)),
    }
    exact = [words for words, fixed in ways.items() if fixed.settles(plan) and not config.has_nonlinear_experts]
    return exact[0] if exact else "approximately, with `--calibrate`"


def index() -> str:
    """The table of all presets."""
    parts = []
    for kind, names in METHODS.items():
        rows = []
        for name in names:
            facts = facts_of(name)
            served = "no" if facts.refusal else "yes"
            cells = (facts.summary, _links(facts.papers), ", ".join(facts.needs), facts.merges.split(":")[0], served)
            rows.append((f"[`{name}`]({name}.md)", *cells))
        head = ("preset", "what it is", "paper", "needs", "merges", "vLLM")
        parts += [f"## {capital(kind)}", table(head, rows)]
    intro = (
        "Each is a preset: `MoLoraConfig.from_preset(name)` in Python, `preset: name` in a run file. What stands here "
        "holds for its defaults; any field may be changed. [Which one?](../choosing.md)"
    )
    return page("Methods", paragraph(intro), *parts)


def method(name: str) -> str:
    """The page of one preset."""
    facts = facts_of(name)
    kind = next(kind for kind, names in METHODS.items() if name in names)
    known = [
        ("kind", kind),
        ("paper", _links(facts.papers) or "none"),
        ("a call must give", " and ".join(facts.needs) or "nothing but tokens"),
        ("merges", facts.merges),
        ("served by vLLM", "no: " + facts.refusal if facts.refusal else "yes, with [molora's plug-in](../serving.md)"),
    ]
    table_of = keys.top_level_keys()
    fields = [
        (f"`{field}`", code(value), meaning(table_of[field])) for field, value in preset_fields(name, {}).items()
    ]
    return page(
        f"`{name}`",
        paragraph(facts.summary),
        f"[All methods](README.md) · [which one?](../choosing.md) · [its tensors](../checkpoint_format.md#{name})",
        table(("", ""), known),
        "## When to use it",
        paragraph(yaml.safe_load(WHEN.read_text(encoding="utf-8"))[name]),
        "## What it computes",
        *_parts(facts.text),
        "## Defaults",
        paragraph(
            "Fields that are not listed have the defaults of [`MoLoraConfig`](../reference/config.md#the-adapter), "
            "where the names that each may take stand, too."
        ),
        table(("field", "value", "meaning"), fields),
        "## Run it",
        *_run_file(name),
        *_python(name),
    )


def _links(papers: Sequence[str]) -> str:
    return ", ".join(f"[{number}](https://arxiv.org/abs/{number})" for number in papers)


def _parts(text: Sequence[str]) -> Iterator[str]:
    """Paragraphs of a docstring, with headings where it turns to differences and to what is not known."""
    for whole in text:
        for part in _TURNS.split(whole):
            title = _TITLES.get(re.split(r"\W", part)[0])
            if title:
                yield f"## {title}"
            yield paragraph(part)


def _run_file(name: str) -> Iterator[str]:
    """The run file, with the commands and remarks of its header."""
    file = f"configs/methods/{name}.yaml"
    header, _, body = (RUN_FILES / f"{name}.yaml").read_text(encoding="utf-8").partition("\n\n")
    lines = [line.removeprefix("#") for line in header.splitlines()[1:]]
    yield block("\n".join(line[3:] for line in lines if line.startswith("   ")))
    yield paragraph(" ".join(line for line in lines if line[:3].strip() and "molora/presets/" not in line))
    yield f"[{file}](../../{file}):"
    yield block(body, "yaml")


def _python(name: str) -> Iterator[str]:
    """How to make it in Python, with `model` the base model."""
    yield "In Python, with `model` the base model:"
    if name in COMPOSED:
        folder = "gates" if name in ("phatgoose", "glider") else "loras"
        folders = [f'"{folder}/sums"'] + [f'"{folder}/dates"'] * (name != "phatgoose-gate")
        call = f'compose(model, [{", ".join(folders)}], preset="{name}")'
        yield block(f"from molora.compose import compose\n\nmodel = {call}", "python")
        return
    target = "" if "target_modules" in preset_fields(name, {}) else ', target_modules="all-linear"'
    lines = (
        "from peft import get_peft_model\n",
        "from molora import MoLoraConfig\n",
        f'config = MoLoraConfig.from_preset("{name}"{target}, task_type="CAUSAL_LM")',
        "model = get_peft_model(model, config)",
    )
    yield block("\n".join(lines), "python")
