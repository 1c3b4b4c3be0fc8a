"""What a server of LoRAs cannot express of a mixture, and what to do instead."""

from __future__ import annotations

from collections.abc import Iterator

from molora.config import MoLoraConfig
from molora.plan import ModulePlan

ROUTERS = ("linear", "arrow", "prototype", "cosine", "activation", "unit_activation", "activation_norm")
"""Routers whose logits follow from one product of the linear's own input."""

LAYOUTS = ("separate", "shared_A", "pairs")
"""Layouts in which every expert has rows of A and columns of B, if need be as copies."""

OUTPUT_LAYERS = ("lm_head", "embed_out", "output_layer")
"""Last names of what maps hidden states to the vocabulary."""

NEAREST = (
    "Serve the nearest plain LoRA, fitted to data and with its error measured: `molora export DIR OUT --as lora "
    "--calibrate data.jsonl`."
)
_EXACT = {
    "task": "`molora export DIR OUT --as lora --task NAME` for each task, or `--as tasks`",
    "scores": "`molora export DIR OUT --as lora --scores N,N,...`",
}


def why_not(config: MoLoraConfig) -> str | None:
    """Why no module of an adapter can be served, in a sentence with the way out; `None` if nothing is in the way."""
    if config.expert_scope == "block":
        return (
            "its experts stand beside whole blocks, for which servers have no place, and no linear has; run it in "
            "PyTorch, or train one with expert_scope='linear'."
        )
    trained = [name for name in ("modules_to_save", "trainable_token_indices") if getattr(config, name)]
    if trained or config.bias != "none":
        what = " and ".join(trained + ["bias"] * (config.bias != "none"))
        merge = "`molora export DIR OUT --as dense" + " --calibrate data.jsonl" * config.is_routed + "`"
        return f"it trained more than experts ({what}), which servers do not load with an adapter. Merge it: {merge}."
    if config.has_nonlinear_experts:
        kinds = {
            "expert_activation": config.expert_activation,
            "expert_bias": config.expert_bias,
            "adapter_position='after'": config.adapter_position == "after",
            "expert_scope='ffn'": config.expert_scope == "ffn",
        }
        what = ", ".join(name for name, given in kinds.items() if given)
        return f"its experts are no linear maps of one linear's input ({what}). {NEAREST}"
    return None


def why_not_place(module: str) -> str | None:
    """Why a module's experts have no place on a server, by its full name, as above."""
    if module.rpartition(".")[2] in OUTPUT_LAYERS:
        return (
            f"it adapts the output layer ({module}), where servers cannot route; train it without, or merge it: "
            "`molora export DIR OUT --as dense --calibrate data.jsonl`."
        )
    return None


def why_not_module(config: MoLoraConfig, plan: ModulePlan) -> str | None:
    """Why one module of an adapter cannot be served, as above."""
    if plan.is_constant:
        return None
    return next(_reasons(config, plan), None)


def _reasons(config: MoLoraConfig, plan: ModulePlan) -> Iterator[str]:
    given = [kind for kind in _EXACT if kind in plan.reads]
    if given and not plan.reads & {"input", "hidden", "state"}:
        ways = ", and ".join(_EXACT[kind] for kind in given)
        yield (
            f"its mixture is fixed by the {' and '.join(given)} of each row, which requests do not name. "
            f"For one of them it is exactly a plain LoRA, which every server loads: {ways}."
        )
    if given:
        yield f"its router reads {' and '.join(given)}, which requests do not carry. {NEAREST}"
    if plan.per_sequence or plan.router_input == "base" or config.router_sharing in ("block", "model"):
        yield (
            "its router reads more than its own linear's input (router_level, router_input or router_sharing). "
            + NEAREST
            + " For one prompt, `--prompt TEXT` is exact." * plan.per_sequence
        )
    narrow = plan.router == "cosine" and config.router_dim
    if plan.router not in ROUTERS or narrow:
        name = "cosine with router_dim" if narrow else plan.router
        yield f"router={name!r} is not one product of the input; servable are {', '.join(ROUTERS)}. {NEAREST}"
    if plan.layout not in LAYOUTS or plan.num_splits > 1:
        what = f"num_splits={plan.num_splits}" if plan.num_splits > 1 else f"expert_layout={plan.layout!r}"
        yield f"{what} mixes factors, not experts; servable are {', '.join(LAYOUTS)}. {NEAREST}"
