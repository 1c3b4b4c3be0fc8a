"""An adapted block: anything from hidden states to hidden states, with experts beside or behind it."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from molora.config import MoLoraConfig
from molora.layer import MoLoraModule
from molora.merging import cannot_merge
from molora.plan import ModulePlan


class MoLoraBlock(MoLoraModule):
    """A frozen block from hidden states to hidden states, plus mixtures of LoRA experts beside or behind it.

    The block may be anything: a mixture-of-experts layer of the base model (PERFT), a whole decoder layer (BECoTTA).
    If it returns several things, experts add to the first.

    Args:
        base_layer: The block.
        adapter_name: Name of the first adapter.
        config: Its configuration.
        plan: What of it concerns this block.
        hidden_size: Size of its input and output.
        **kwargs: As for `MoLoraModule`.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: MoLoraConfig,
        plan: ModulePlan,
        hidden_size: int,
        **kwargs: Any,
    ) -> None:
        super().__init__(base_layer, adapter_name, config, plan, hidden_size, hidden_size, **kwargs)

    def forward(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        """Run the block on hidden states `[..., d]` and add the experts to its first output.

        Args:
            *args: Passed to the block; the hidden states come first, or as the keyword `hidden_states`.
            adapter_names: For each row of the batch the adapter to use, or `"__base__"` for none.
            **kwargs: Passed to the block.
        """
        x: Tensor = args[0] if args else kwargs["hidden_states"]
        self._check_forward_args(x, adapter_names)
        result = self.base_layer(*args, **kwargs)
        if self._is_off():
            return result
        if isinstance(result, Tensor):
            return self._add(result, x, adapter_names)
        return type(result)((self._add(result[0], x, adapter_names), *result[1:]))

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[Any, Any]:
        # PEFT asks a layer for its weight; a block has many, and its adapters go with the first.
        first = next((p for p in base_layer.parameters() if p.is_floating_point()), None)
        return (None, None) if first is None else (first.device, first.dtype)

    def __getattr__(self, name: str) -> Any:
        # The model around a block may ask it for more than its output, such as the kind of attention of a layer.
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse: a block has no one weight.

        Raises:
            MergeError: Always.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            raise cannot_merge(name, self.molora_plan[name].reads)
