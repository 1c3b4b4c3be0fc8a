"""Base models with quantised weights: how a run file asks for one, and what PEFT needs to adapt one.

The keys are those of TRL's `ModelConfig`, which quantises with bitsandbytes while loading. Models that another library
quantised come as checkpoints and say so themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import yaml
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D
from transformers.utils import is_bitsandbytes_available

from molora.errors import MergeError, MoloraError

INSTALL_HINT = 'pip install "molora[quantization]"'

RUN_FILE = "molora_run.yaml"
"""Written beside a trained adapter: the run file that made it."""

_ROUTING = (".molora_router.", ".molora_threshold.", ".molora_blend.")
"""In the names of parameters that choose and weigh experts."""

_BLOCK, _OUTER_BLOCK = 64, 256
"""Weights that share a scale in bitsandbytes' 4 bits, and scales that share one when nested."""


class QuantizationError(MoloraError):
    """A model cannot be loaded with the quantisation asked for."""


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """How bitsandbytes quantises a model while loading it; names and defaults are those of TRL's `ModelConfig`.

    Attributes:
        load_in_8bit: LLM.int8().
        load_in_4bit: The 4 bits of QLoRA.
        bnb_4bit_quant_type: `"nf4"` or `"fp4"`.
        use_bnb_nested_quant: Quantise the scales of the 4 bits too.
        bnb_4bit_quant_storage: Data type that 4 bits are packed into; `None` is `uint8`.
    """

    load_in_8bit: bool = False
    load_in_4bit: bool = False
    bnb_4bit_quant_type: str = "nf4"
    use_bnb_nested_quant: bool = False
    bnb_4bit_quant_storage: str | None = None

    @classmethod
    def of(cls, arguments: Any) -> Quantization:
        """Take the fields from `ModelArguments`, or from TRL's `ModelConfig`."""
        return cls(**{field.name: getattr(arguments, field.name) for field in fields(cls)})

    @classmethod
    def of_run(cls, directory: str) -> Quantization:
        """How the base model was loaded when the adapter in a folder was trained; nothing if nothing says so."""
        folder = Path(directory)
        of_run = folder.absolute().parent if folder.absolute().name.startswith("checkpoint-") else folder
        file = next((file for file in (folder / RUN_FILE, of_run / RUN_FILE) if file.is_file()), None)
        try:
            content = yaml.safe_load(file.read_text(encoding="utf-8")) if file is not None else None
        except yaml.YAMLError:
            content = None
        known = {field.name for field in fields(cls)}
        given = content.items() if isinstance(content, dict) else ()
        return cls(**{name: value for name, value in given if name in known})

    @property
    def asked(self) -> bool:
        """Whether the model is to be quantised at all."""
        return self.load_in_4bit or self.load_in_8bit

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield field and message of each mistake, before anything is loaded."""
        if self.load_in_4bit and self.load_in_8bit:
            yield "load_in_8bit", "a model is loaded in 8 bits or in 4, and `load_in_4bit` is set too; leave one out."
        if not self.load_in_4bit:
            for field in fields(self):
                if "bnb" in field.name and getattr(self, field.name) != field.default:
                    yield field.name, "has no effect without `load_in_4bit: true`; set that, or leave this out."
        if self.asked and not is_bitsandbytes_available():
            key = "load_in_4bit" if self.load_in_4bit else "load_in_8bit"
            yield key, f"needs the bitsandbytes package, which is not installed or too old: {INSTALL_HINT}"

    def config(self, dtype: str | torch.dtype) -> BitsAndBytesConfig | None:
        """What transformers is given, exactly as TRL makes it; `None` if nothing is asked for.

        Args:
            dtype: Of what is not quantised; 4-bit weights are computed with in it.

        Raises:
            QuantizationError: If the fields contradict each other or bitsandbytes is missing.
        """
        from trl import get_quantization_config

        problems = [f"{field}: {message}" for field, message in self.problems()]
        if problems:
            raise QuantizationError(" ".join(problems))
        arguments: Any = SimpleNamespace(**asdict(self), dtype=dtype)
        return get_quantization_config(arguments)

    def bytes_of(self, model: Any) -> int:
        """Bytes that a model's frozen parameters take once they are loaded.

        Args:
            model: As it is without quantisation, adapted or not, on any device.
        """
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        linears = [
            module for module in model.modules() if isinstance(module, nn.Linear | Conv1D) and module is not head
        ]
        # A head that shares its weight with the embeddings keeps it as it is.
        quantised = {id(linear.weight) for linear in linears} if self.asked else set()
        sizes = [
            p.numel() * (self._bytes_per_weight() if id(p) in quantised else p.element_size())
            for p in model.parameters()
            if not p.requires_grad
        ]
        return round(sum(sizes))

    def _bytes_per_weight(self) -> float:
        if self.load_in_8bit:
            return 1.0
        return 0.5 + (1 / _BLOCK + 4 / _BLOCK / _OUTER_BLOCK if self.use_bnb_nested_quant else 4 / _BLOCK)


def refuse_quantising_twice(config: Any, name: str) -> None:
    """Refuse to quantise a checkpoint that is quantised; transformers would only warn and ignore what was asked.

    Args:
        config: The model's config.
        name: Its name, for the message.

    Raises:
        QuantizationError: Naming how the checkpoint was quantised.
    """
    saved = getattr(config, "quantization_config", None)
    if saved is None:
        return
    method = saved.get("quant_method", "") if isinstance(saved, dict) else getattr(saved, "quant_method", "")
    how = f" with {getattr(method, 'value', method)}" if method else ""
    raise QuantizationError(f"{name!r} is quantised already{how} and is loaded so by itself; leave the key out.")


def refuse_half_loaded(model: Any, name: str) -> None:
    """Refuse an HQQ checkpoint, which transformers 5 takes and then leaves without its weights.

    Raises:
        QuantizationError: If the model is one.
    """
    if getattr(getattr(model, "quantization_method", None), "value", None) == "hqq":
        raise QuantizationError(
            f"{name!r} is quantised with HQQ, which this version of transformers cannot load; take the checkpoint "
            "it was made from, and quantise it with `load_in_4bit` or, in Python, with the hqq package itself."
        )


def keep_packing(model: nn.Module) -> None:
    """Keep bitsandbytes from packing 4-bit weights anew in evaluation, as it does on CPUs with AVX512-BF16.

    Nothing but its inference kernel reads that packing (bitsandbytes 0.50): gradients stop there without an error,
    merging and saving take it for the other one, and outputs are of bfloat16 whatever the compute type.

    Args:
        model: A model whose linears may be quantised.

    Raises:
        QuantizationError: If weights are packed so already.
    """
    for name, module in model.named_modules():
        if not getattr(module, "support_avx512bf16_for_cpu", False):
            continue
        if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise QuantizationError(
                f"the 4-bit weights of {name!r} were packed for inference on this CPU when the model ran in "
                "evaluation; they can no longer be trained through or merged into. Load the model again, and add the "
                "adapter before it runs."
            )
        module.support_avx512bf16_for_cpu = False


def quantization_backend(module: nn.Module, get_apply_tensor_subclass: Callable[[], Any] | None = None) -> Any | None:
    """PEFT's backend for a quantised module, or `None` for an ordinary one.

    Args:
        module: The base layer.
        get_apply_tensor_subclass: How torchao quantised the model, which merging needs. transformers knows it of a
            model that it loaded; PEFT refuses all others, though training them needs nothing of the kind.
    """
    backend = resolve_quantization_backend(
        module, get_apply_tensor_subclass=get_apply_tensor_subclass or _unknown_subclass
    )
    if backend is not None and backend.backend_name == "torchao" and get_apply_tensor_subclass is None:
        backend.supports_merge = False
    return backend


def _unknown_subclass() -> Any:
    raise MergeError("how torchao quantised this model is not known.")


def check_merge(backend: Any | None) -> None:
    """Refuse to merge into weights that cannot be read or quantised again.

    Raises:
        MergeError: Naming the library.
    """
    if backend is None or backend.supports_merge:
        return
    torchao = backend.backend_name == "torchao"
    hint = " load it with transformers' TorchAoConfig, or" if torchao else ""
    raise MergeError(
        f"the base weights are quantised with {backend.backend_name}, and cannot be quantised again after merging;"
        f"{hint} keep the adapter unmerged, or merge it into the model as it was before it was quantised."
    )


def routing_values(model: Any) -> dict[nn.Parameter, Tensor]:
    """The parameters of a model's routing, each with the tensor that holds its values now."""
    return {p: p.data for p in _routing_parameters(model)}


def restore_routing(model: Any, before: dict[nn.Parameter, Tensor]) -> None:
    """Undo the rounding of routing parameters to bfloat16 by TRL's trainers.

    They round every trained parameter on a quantised base, as QLoRA does with A and B. The steps of a router are often
    below what bfloat16 can hold, and near-ties between experts would fall differently.

    Args:
        model: The adapted model, after the trainer was made.
        before: `routing_values` of the model before; may lack some, which the trainer itself made.
    """
    for parameter in _routing_parameters(model):
        old = before.get(parameter)
        if parameter.dtype not in (torch.bfloat16, torch.float16):
            continue  # moved to its device perhaps, but not rounded
        if old is None:
            parameter.data = parameter.data.float()
        elif old.dtype != parameter.dtype:
            parameter.data = old.to(parameter.device)


def _routing_parameters(model: Any) -> Iterable[nn.Parameter]:
    if not isinstance(model, nn.Module):  # a name, which the trainer is to load
        return []
    return [p for name, p in model.named_parameters() if any(part in name for part in _ROUTING)]
