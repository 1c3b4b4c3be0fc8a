"""What an adapter is, in facts and in one formula."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from molora.config import MoLoraConfig
from molora.loaded import read_run
from molora.parameters import module_kind
from molora.plan import routing_spec
from molora.reports.folder import Folder
from molora.shown import last_part

_PACKAGES = ("molora", "torch", "transformers", "peft", "trl", "datasets", "accelerate")
_SELECTED = {
    "dense": "all experts",
    "top_k": "the {top_k} most probable",
    "top_p": "the most probable up to {top_p:g} in sum",
    "threshold": "those of at least {threshold:g}",
    "adaptive_threshold": "those above a learned threshold, up to {max_threshold:g}",
}
_SHARED = {"one": "1", "remainder": "what the others leave of 1"}


def about(folder: Folder) -> dict[str, str]:
    """Facts about an adapter by name; none is empty."""
    config, run = folder.adapter.config, read_run(str(folder.path))
    spec = routing_spec(config)
    selected = _SELECTED.get(spec.selection, spec.selection.replace("_", " ")).format(**vars(spec))
    kinds: dict[str, int] = {}
    for module in folder.adapter.modules:
        kinds[module_kind(module)] = kinds.get(module_kind(module), 0) + 1
    step = folder.state.get("global_step")
    trained = ", ".join(folder.tasks)
    facts = {
        "base model": base_name(config),
        "method": run.preset if run is not None and run.preset else "its own choices, see the configuration",
        "experts": _experts(config),
        "router": config.router.replace("_", " ")
        + (f", one decision a {config.router_level}" if config.router_level != "token" else ""),
        "gate": f"{spec.gate}, temperature {spec.temperature:g}",
        "used for a token": selected + f", and the {config.shared_experts} shared" * bool(config.shared_experts),
        "mixing weights": spec.weights.replace("_", " ") + (", made to sum to one" if spec.renormalize else ""),
        "weight of a shared expert": _SHARED[config.shared_weight] if config.shared_experts else "",
        "adapted linears": ", ".join(f"{number} {kind}" for kind, number in sorted(kinds.items())),
        "trained on": trained,
        "steps": f"{step:,}" if isinstance(step, int) else "",
        "state": "a checkpoint of a training" if folder.is_checkpoint else "",
    }
    return {name: value for name, value in facts.items() if value}


def base_name(config: MoLoraConfig) -> str:
    """What the base model is called; of a folder on someone's disk only its last part."""
    return last_part(str(config.base_model_name_or_path or "not named"))


def formula(config: MoLoraConfig) -> str:
    """What an adapted linear computes."""
    where = "W₀x" if config.adapter_position == "after" else "x"
    experts = "Σₑ wₑ(x) · sₑ Bₑ Aₑ " + where if config.is_routed else "Σₑ sₑ Bₑ Aₑ " + where
    if config.expert_activation:
        experts = experts.replace(f"Aₑ {where}", f"{config.expert_activation}(Aₑ {where})")
    return f"y = W₀x + {experts}"


def versions(config: MoLoraConfig) -> dict[str, str]:
    """Versions of what made the page, and of what saved the adapter."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    saved = str(getattr(config, "peft_version", None) or "")
    return {**found, **({"peft that saved the adapter": saved} if saved else {}), "format": str(config.format_version)}


def _experts(config: MoLoraConfig) -> str:
    number, rank = config.num_experts, config.r
    many = str(number) if isinstance(number, int) else f"{', '.join(map(str, number))} with depth,"
    size = str(rank) if isinstance(rank, int) else ", ".join(map(str, rank))
    shared = f", and {config.shared_experts} shared" if config.shared_experts else ""
    null = f", and {config.null_experts} that do nothing" if config.null_experts else ""
    return f"{many} of rank {size}, alpha {config.lora_alpha:g}{shared}{null}"
