"""The models that are timed: a random Llama, and each method that adapts it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.loops import AdamoleLoop, ExpertLoop, TopKLoop, as_loop
from molora import MoLoraConfig
from molora.presets import preset_fields
from molora.routing.routers.affine import Affine

# No trainer moves the balancing bias of `recommended` here; it is added all the same.
warnings.filterwarnings("ignore", message="this training leaves out balance_bias_rate")

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ALPHA = 16


@dataclass(frozen=True)
class Sizes:
    """Sizes of the base model and of the mixtures."""

    hidden: int = 1024
    intermediate: int = 2816
    vocab: int = 8192
    layers: int = 4
    heads: int = 16
    experts: int = 8
    rank: int = 8
    top_k: int = 2
    dtype: torch.dtype = torch.float32

    @property
    def active_rank(self) -> int:
        """Rank that one token uses under top-k."""
        return self.top_k * self.rank

    @property
    def total_rank(self) -> int:
        """Rank of all experts together."""
        return self.experts * self.rank


@dataclass
class Built:
    """A model ready to run.

    Attributes:
        model: Called with `input_ids`.
        trained: Its trained parameters. Some peers keep them outside the module tree.
        keywords: What every call needs besides.
        cached: It can fill a cache.
    """

    model: Any
    trained: list[nn.Parameter | Tensor]
    keywords: dict[str, Any] = field(default_factory=dict)
    cached: bool = True

    def __call__(self, **kwargs: Any) -> Any:
        return self.model(**kwargs, **self.keywords)


@dataclass(frozen=True)
class Method:
    """One row of a table.

    Attributes:
        name: What the row is called.
        kind: `base`, `peft`, `molora`, `loop` or `peer`.
        build: Makes the model, from its base and the sizes.
        one_layer: It adapts linears one by one, so that a single one can be looked at.
        decodes: It generates with a cache.
        note: What a reader must know to compare fairly.
        kernels: The implementation of molora's products it runs with; `None` for what the environment says.
        twin: The molora method that computes the same function, for loops.
        config: Makes the adapter's config, for molora's methods; not every version knows every choice.
    """

    name: str
    kind: str
    build: Callable[[nn.Module, Sizes], Built]
    one_layer: bool = True
    decodes: bool = True
    note: str = ""
    kernels: str | None = None
    twin: Method | None = None
    config: Callable[[Sizes], MoLoraConfig] | None = None


class OneLinear(nn.Module):
    """A single linear as a model, named like one of Llama's so that every method finds it."""

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.q_proj = nn.Linear(size, size, bias=False, dtype=dtype).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, S, d]` to `[B, S, d]`."""
        return self.q_proj(x)


def base_model(sizes: Sizes, seed: int = 0) -> LlamaForCausalLM:
    """A frozen random Llama; the same seed gives the same weights.

    Embeddings give out a gradient, so that all methods, and the base by itself, do the same work on the base weights.
    """
    config = LlamaConfig(
        vocab_size=sizes.vocab,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).to(dtype=sizes.dtype).requires_grad_(False)  # type: ignore[call-arg]
    model.get_input_embeddings().register_forward_hook(_differentiable)
    return model


def _differentiable(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    return output.requires_grad_() if torch.is_grad_enabled() else output


def build(method: Method, sizes: Sizes, base: nn.Module | None = None, training: bool = True) -> Built:
    """Build a method, on a new random base unless one is given.

    A freshly drawn B is zero in most methods and small in some; here it is drawn alike in all.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        built = method.build(base if base is not None else base_model(sizes), sizes)
    built.model.train(training)
    return built


def _trained(model: nn.Module) -> list[nn.Parameter | Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _of_base(base: nn.Module, _sizes: Sizes) -> Built:
    return Built(base, [])


def lora_config(rank: int) -> LoraConfig:
    """PEFT's LoRA on all linears."""
    return LoraConfig(r=rank, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=LINEARS, init_lora_weights=False)


def molora_config(sizes: Sizes, **fields: Any) -> MoLoraConfig:
    """A mixture on all linears; top-k with a router per linear unless fields say otherwise."""
    chosen: dict[str, Any] = {
        "r": sizes.rank,
        "num_experts": sizes.experts,
        "lora_alpha": ALPHA,
        # Not the list: molora refuses names that a model lacks, as a single linear does.
        "target_modules": rf"(.*\.)?({'|'.join(LINEARS)})",
        "router": "linear",
        "gate": "softmax",
        "selection": "top_k",
        "top_k": sizes.top_k,
        "init_weights": False,
    }
    return MoLoraConfig(**{name: value for name, value in (chosen | fields).items() if value is not None})


def _lora(base: nn.Module, sizes: Sizes, rank: Callable[[Sizes], int]) -> Built:
    model = get_peft_model(base, lora_config(rank(sizes)), autocast_adapter_dtype=False)
    return _drawn(model)


def _config(sizes: Sizes, fields: Callable[[Sizes], dict[str, Any]]) -> MoLoraConfig:
    return molora_config(sizes, **fields(sizes))


def _molora(base: nn.Module, sizes: Sizes, fields: Callable[[Sizes], dict[str, Any]]) -> Built:
    config = _config(sizes, fields)
    return _drawn(get_peft_model(base, config, autocast_adapter_dtype=False))


@torch.no_grad()
def _drawn(model: nn.Module) -> Built:
    """Draw B, which may be zero, and what routers know of their inputs, as if there had been data."""
    for name, parameter in model.named_parameters():
        if "molora_B" in name or "lora_B" in name:
            parameter.normal_(std=0.01)
    for module in model.modules():
        if isinstance(module, Affine) and module.awaits_data:
            size = module.weight.shape[1]
            module.set_statistics(0.1 * torch.randn(size), 0.5 + torch.rand(size))
    return Built(model, _trained(model))


def _loop(base: nn.Module, sizes: Sizes, kind: type[ExpertLoop], selection: dict[str, Any]) -> Built:
    built = _molora(base, sizes, lambda _: selection)
    return _looped(built, sizes, kind)


def _looped(built: Built, sizes: Sizes, kind: type[ExpertLoop]) -> Built:
    model = as_loop(built.model, kind, ALPHA / sizes.rank, sizes.top_k)
    return Built(model, _trained(model))


WITHOUT_DATA = {"router_init": "kaiming_uniform", "router_confidence": None}
"""A router drawn at random costs what one made from data costs."""


def recommended(sizes: Sizes) -> dict[str, Any]:
    """The preset in these sizes: as many experts in all, the last of them shared."""
    own = {"r": sizes.rank, "top_k": sizes.top_k, "lora_alpha": ALPHA, **WITHOUT_DATA}
    fields = preset_fields("recommended", own)
    return fields | {"num_experts": sizes.experts - fields["shared_experts"]}


ADAPTIVE: dict[str, Any] = {"selection": "adaptive_threshold", "top_k": None}


def own_methods(sizes: Sizes) -> list[Method]:
    """Base, PEFT's LoRA, molora and the loops; names carry the sizes, as ranks are what a reader compares."""
    e, r, k = sizes.experts, sizes.rank, sizes.top_k
    fields: dict[str, Callable[[Sizes], dict[str, Any]]] = {
        "molora recommended": recommended,
        f"molora top-{k}": lambda s: {},
        f"molora top-{k}, router per input": lambda s: {"router_sharing": "input"},
        "molora adaptive threshold": lambda s: ADAPTIVE,
        "molora top-p 0.5": lambda s: {"selection": "top_p", "top_p": 0.5, "top_k": None},
        f"molora rank-1 E={e} top-{k}": lambda s: {"r": 1},
        f"molora rank-1 E={e * r} top-{k * r}": lambda s: {"r": 1, "num_experts": e * r, "top_k": k * r},
        "molora static": lambda s: {"router": "static", "selection": "dense", "top_k": None},
    }
    mixtures = {
        name: Method(name, "molora", partial(_molora, fields=of), config=partial(_config, fields=of))
        for name, of in fields.items()
    }
    top_k, adaptive = mixtures[f"molora top-{k}"], mixtures["molora adaptive threshold"]
    return [
        Method("base, frozen", "base", _of_base),
        Method(f"PEFT LoRA r={k * r}", "peft", partial(_lora, rank=lambda s: s.active_rank)),
        Method(f"PEFT LoRA r={e * r}", "peft", partial(_lora, rank=lambda s: s.total_rank)),
        *mixtures.values(),
        replace(top_k, name=f"{top_k.name}, plain torch", kernels="reference"),
        Method(f"loop, Mixtral style, top-{k}", "loop", partial(_loop, kind=TopKLoop, selection={}), twin=top_k),
        Method("loop, AdaMoLE style", "loop", partial(_loop, kind=AdamoleLoop, selection=ADAPTIVE), twin=adaptive),
    ]


def reference_of(methods: list[Method]) -> Method:
    """What all rows are compared with: PEFT's LoRA of the rank that one token uses."""
    return next(method for method in methods if method.kind == "peft")


def available(methods: list[Method], sizes: Sizes) -> tuple[list[Method], dict[str, str]]:
    """The methods that this version of molora can be configured for, and why not the others."""
    found, missing = [], {}
    for method in methods:
        try:
            if method.config is not None:
                method.config(sizes)
        except ValueError as error:
            missing[method.name] = str(error)
        else:
            found.append(method)
    return found, missing
