"""Write the part of docs/checkpoint_format.md that lists every tensor of every preset, from real adapters.

    python tests/list_parameters.py           # print it
    python tests/list_parameters.py --write   # put it into the file

Each shape in letters is evaluated and compared with the tensor it describes, so that a wrong one is an error here.
"""

from __future__ import annotations

import functools
import json
import re
import sys
import textwrap
from pathlib import Path

import tiny
import torch
from methods import MOE_MODELS
from peft import get_peft_model, get_peft_model_state_dict

from molora import MoLoraConfig
from molora.bank import MoLoraLayer
from molora.compose import ImportedLora, config_from_adapters
from molora.presets import METHODS, PRESETS, preset_fields

DOCUMENT = Path(__file__).parent.parent / "docs" / "checkpoint_format.md"
BEGIN, END = "<!-- tests/list_parameters.py: begin -->", "<!-- tests/list_parameters.py: end -->"
COMPOSED = METHODS["composed from trained LoRAs"]
WIDTH = 119

ROUTERS = {
    "linear": {
        "weight": ("L, f", "one row a logit"),
        "bias": ("L", "added to the logits"),
        "input_mean": ("f", "mean μ of the features, fp32"),
        "input_std": ("f", "their deviation σ, fp32"),
    },
    "arrow": {"weight": ("L, f", "prototypes")},
    "prototype": {"weight": ("L, f", "gate vectors `v_e`")},
    "mlp": {
        "weight_in": ("router_dim, f", "first layer"),
        "bias_in": ("router_dim", "its bias"),
        "weight": ("L, router_dim", "second layer"),
        "bias": ("L", "its bias"),
    },
    "normalized": {
        "weight": ("L, f", "one row a logit, normed before use"),
        "bias": ("L", "added to the logits"),
        "input_scale": ("f", "scale behind the norm of the features"),
        "weight_scale": ("f", "scale behind the norm of the rows"),
    },
    "task": {
        "embedding": ("num_tasks, router_dim", "one row a task"),
        "weight": ("L, router_dim", "one row a logit"),
        "bias": ("L", "added to the logits"),
    },
    "table": {"weight": ("num_tasks, num_splits*L", "logits, split by split")},
    "domain": {
        "weight": ("num_tasks, L, f", "a linear router for each domain"),
        "noise": ("num_tasks, L, f", "scale of the noise; training only"),
    },
    "static": {"weight": ("L", "the logits")},
}
PARTS = {
    "molora_threshold.weight": ("1, f", "threshold net"),
    "molora_threshold.bias": ("1", "its bias"),
    "molora_threshold.input_mean": ("f", "mean μ of the features, fp32"),
    "molora_threshold.input_std": ("f", "their deviation σ, fp32"),
    "molora_blend.token": ("1", "θ, share of the router"),
    "molora_blend.output": ("1", "φ, factor of what is added"),
    "molora_bias.weight": ("L", "balancing bias β, fp32, moved by trainers"),
    "molora_pool.weight_A": ("P, in/num_shards", "shards of rows of A"),
    "molora_pool.weight_B": ("P, out/num_shards", "shards of columns of B"),
    "molora_A.index": ("r, num_shards", "int64, rows of `weight_A` in each row of A"),
    "molora_B.index": ("r, num_shards", "int64, the same for columns of B"),
}
BANKS = {
    "separate": ("R", "in", "out", "R"),
    "factors": ("R", "in", "out", "R"),
    "shared_A": ("r", "in", "out", "R"),
    "pairs": ("r1", "in", "out", "r2"),
}


def template(name, plan):
    """Shape in letters and meaning of a tensor of one module."""
    if name in PARTS:
        return PARTS[name]
    if name.startswith("molora_router."):
        return ROUTERS[plan.router][name.removeprefix("molora_router.")]
    rows, size_in, size_out, columns = BANKS[plan.layout]
    if name.startswith("molora_frozen_"):
        rows, columns, who = "F", "F", "imported experts"
    elif plan.frozen_rank:
        rows, columns, who = "R-F", "R-F", "further experts"
    else:
        who = "plain LoRA" if plan.router == "none" else "all experts"
    if name.endswith("A.bias"):
        return rows, f"added to `A x`, {who}"
    if name.endswith("A.weight"):
        return f"{rows}, {size_in}", f"rows of A, {who}"
    return f"{size_out}, {columns}", f"columns of B, {who}"


def letters(shape, config, plan):
    """A shape as it is printed for one preset: what is the same thing gets one letter."""
    size_in = "d" if config.expert_scope == "block" else "out" if plan.after else "in"
    feature = "d" if plan.router_input == "base" else size_in
    logits = "E+N" if plan.spec.null_experts else "E"
    if plan.num_splits == 1:
        shape = shape.replace("num_splits*L", "L")
    words = {"in": size_in, "f": feature, "L": logits, "out": "d" if config.expert_scope == "block" else "out"}
    if plan.router == "none":
        words["R"] = "r"
    shape = re.sub(r"[A-Za-z_0-9]+", lambda word: words.get(word[0], word[0]), shape)
    return "[" + shape.replace("*", "·").replace("R-F", "R−F") + "]"


def check(shape, tensor, config, layer, plan):
    """Evaluate a shape in letters, and compare."""
    r = plan.r if isinstance(plan.r, list) else [plan.r, plan.r]
    group = layer.molora_group.get("default")
    values = {
        "R": sum(plan.ranks),
        "F": plan.frozen_rank,
        "r": r[0],
        "r1": r[0],
        "r2": r[1],
        "L": plan.num_experts + plan.spec.null_experts,
        "out": layer.out_features,
        "router_dim": config.router_dim or 64,
        "num_tasks": config.num_tasks,
        "num_splits": plan.num_splits,
        "num_shards": config.num_shards,
        "P": (config.pool_rank or r[0]) * config.num_shards * plan.of_kind,
    }
    size_in = layer.out_features if plan.after else layer.in_features
    values["f"] = group.feature_size if group is not None else size_in
    words = {"in": size_in, **values}
    got = [eval(re.sub(r"\bin\b", str(words["in"]), part), {}, values) for part in shape.split(", ")]
    assert got == list(tensor.shape), (shape, got, tensor.shape)


def where(holders, layers, config):
    """Which of the adapted modules hold a tensor, in words; an error if they are none of these."""
    mixed = [name for name, layer in layers.items() if layer.molora_plan["default"].router == config.router]
    plain = [name for name in layers if name not in mixed]
    leaders = {id(layer.molora_group["default"].leader) for layer in layers.values() if layer.molora_group}
    first = [name for name in mixed if id(layers[name]) in leaders]
    by_kind = [name for name, layer in layers.items() if "default" in layer.molora_pool]
    if holders == by_kind:
        return "first of its kind"
    if holders == mixed:
        return "every module in an FFN block" if plain else "every module"
    if holders == plain:
        return "every other module"
    assert holders == first, (holders, first)
    if config.expert_scope == "ffn":
        return "first of each FFN block"
    return {
        "input": "first of each input",
        "model": "first of the model",
        "weights": "first of each input size",
    }[config.router_sharing]


@functools.cache
def build(preset, composed):
    """A fresh adapter with the preset's own defaults on a tiny model."""
    base = MOE_MODELS["olmoe"]() if preset == "perft" else tiny.tiny_llama(hidden_size=48, intermediate_size=80)
    own = preset_fields(preset, {})
    fields = {"task_type": "CAUSAL_LM"}
    if composed:
        number = 1 if own.get("num_experts") == 1 else 2
        loras = [imported(base, f"lora{i}", 2 if preset == "lorahub" else 2 + i) for i in range(number)]
        if preset == "psec":
            fields["num_experts"] = number + 1
        config = config_from_adapters(MoLoraConfig, loras, preset, fields)
    else:
        fields |= {} if "target_modules" in own else {"target_modules": "all-linear"}
        config = MoLoraConfig.from_preset(preset, **fields)
    return get_peft_model(base, config)


def imported(base, name, r):
    """A trained LoRA with a gate, as far as shapes go."""
    linears = {key: m for key, m in base.named_modules() if isinstance(m, torch.nn.Linear) and key != "lm_head"}
    factors = {k: (torch.ones(r, m.in_features), torch.ones(m.out_features, r), 1.0) for k, m in linears.items()}
    gates = {key: torch.ones(linear.in_features) for key, linear in linears.items()}
    return ImportedLora(name, {"r": r, "lora_alpha": r}, factors, gates)


def rows_of(model):
    """One row a tensor: name, shape in letters, example, holders, trained, meaning."""
    config = model.peft_config["default"]
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MoLoraLayer)}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    found: dict[tuple[str, str, str], dict[str, torch.Tensor]] = {}
    for key, tensor in get_peft_model_state_dict(model).items():
        name = next(name for name in layers if key.startswith(name + ".molora_"))
        layer, tensor_name = layers[name], key.removeprefix(name + ".")
        plan = layer.molora_plan["default"]
        shape, meaning = template(tensor_name, plan)
        check(shape, tensor, config, layer, plan)
        found.setdefault((tensor_name, letters(shape, config, plan), meaning), {})[name] = tensor
    for (tensor_name, shape, meaning), holders in found.items():
        container, _, rest = tensor_name.partition(".")
        learns = {f"{name}.{container}.default.{rest}" in trained for name in holders}
        assert len(learns) == 1
        example = list(next(iter(holders.values())).shape)
        place = where(list(holders), layers, config)
        yield f"`{tensor_name}`", f"`{shape}`", f"`{example}`", place, "yes" if learns.pop() else "no", meaning


def table_of(model):
    """A Markdown table of what an adapter's file holds."""
    yield "| tensor | shape | example | on | trained | meaning |"
    yield "|---|---|---|---|---|---|"
    order = ["molora_A", "molora_B", "molora_frozen", "molora_pool", "molora_router", "molora_threshold"]
    rank = {name: index for index, name in enumerate(order)}

    def place(row):
        return next((rank[name] for name in order if row[0].startswith(f"`{name}")), len(order))

    yield from ("| " + " | ".join(row) + " |" for row in sorted(rows_of(model), key=place))


def section(preset):
    """What the file says about one preset."""
    summary, equation = re.split(r"\n\s*\n", PRESETS[preset].__doc__)[:2]
    fields = {name: value for name, value in preset_fields(preset, {}).items() if name != "routing_losses"}
    model = build(preset, False)
    plans = [layer.molora_plan["default"] for layer in model.modules() if isinstance(layer, MoLoraLayer)]
    reads = frozenset().union(*(plan.reads for plan in plans))
    yield f"### `{preset}`\n"
    yield fill(f"{summary} {equation}") + "\n"
    yield fill("Fields: " + ", ".join(f"`{name}: {json.dumps(value)}`" for name, value in fields.items()) + ".") + "\n"
    if reads & {"task", "scores"}:
        given = {"task": "`task_ids [B]`", "scores": "`expert_scores [B, E]`"}
        yield "A call must give " + " and ".join(given[what] for what in sorted(reads & given.keys())) + ".\n"
    if preset in COMPOSED:
        yield "From the preset alone, without adapters:\n"
    yield from table_of(model)
    if preset in COMPOSED:
        new = ", with one new expert behind them" if preset == "psec" else ""
        yield f"\nComposed of trained LoRAs{new}:\n"
        yield from table_of(build(preset, True))
    yield ""


def fill(text):
    """One paragraph at the width of the file."""
    return textwrap.fill(" ".join(text.split()), WIDTH, break_long_words=False, break_on_hyphens=False)


def defaults():
    """What fields have that a preset does not name; those that are empty or tell PEFT where to look are left out."""
    config = MoLoraConfig()
    values = {entry.name: getattr(config, entry.name) for entry in MoLoraConfig.user_fields()}
    named = ", ".join(
        f"`{name}: {json.dumps(value)}`" for name, value in values.items() if value not in (None, {}, [])
    )
    yield fill(f"Defaults of `MoLoraConfig`, the others being empty: {named}.") + "\n"


def generated():
    """The whole part."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sections = [line for names in METHODS.values() for name in names for line in section(name)]
        return "\n".join([*defaults(), *sections])


def main():
    """Print it, or write it."""
    if sys.argv[1:] != ["--write"]:
        sys.stdout.write(generated())
        return
    before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    DOCUMENT.write_text(f"{before}{BEGIN}\n\n{generated()}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
