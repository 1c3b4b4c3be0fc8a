"""A stand-in for vLLM: modules of the names and signatures that the plug-in uses, with the behaviour it relies on."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import torch
from safetensors.torch import load_file

SLOTS, RANK = 3, 64
PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def stand_in():
    """Modules by name. Made anew for every test, as the plug-in changes classes."""

    class Layer:
        def set_mapping(self, punica_wrapper):
            self.punica_wrapper = punica_wrapper

    class Linear(Layer):
        """A linear with room for LoRAs, of one slice or several."""

        def __init__(self, size, widths, slots=SLOTS, rank=RANK, tp_size=1):
            self.device, self.tp_size, self.output_slices = torch.device("cpu"), tp_size, tuple(widths)
            self.lora_a_stacked = tuple(torch.zeros(slots, 1, rank, size) for _ in widths)
            self.lora_b_stacked = tuple(torch.zeros(slots, 1, width, rank) for width in widths)

        def reset_lora(self, index):
            for stack in (*self.lora_a_stacked, *self.lora_b_stacked):
                stack[index] = 0

        def set_lora(self, index, lora_a, lora_b):
            self.reset_lora(index)
            for number, (a, b) in enumerate(self.by_slice(lora_a, lora_b)):
                if a is not None:
                    self.lora_a_stacked[number][index, 0, : a.shape[0], : a.shape[1]] = a
                    self.lora_b_stacked[number][index, 0, : b.shape[0], : b.shape[1]] = b

        def by_slice(self, lora_a, lora_b):
            return list(zip(lora_a, lora_b, strict=True)) if isinstance(lora_a, list) else [(lora_a, lora_b)]

        def _apply_lora_to_output(self, x, output):
            stacks = self.lora_a_stacked, self.lora_b_stacked
            self.punica_wrapper.add_lora_linear(output, x, *stacks, 1.0, self.output_slices)
            return output

    class RowParallel(Linear):
        pass

    class Head(Linear):
        pass

    class Punica:
        """Knows the slot of every token of a step; a mapping is simply these."""

        def update_metadata(self, mapping, lora_index_to_id, max_loras, vocab_size, **kwargs):
            self.token_lora_indices = torch.tensor(mapping)
            self._token_lora_indices = torch.tensor([*mapping, 1, 99, -7])  # longer, with what was there before

        def add_shrink(self, y, x, lora_a_stacked, scale, **kwargs):
            """As on a GPU: nothing is written for tokens without an adapter."""
            y.fill_(torch.nan)
            for token, slot in enumerate(self.token_lora_indices.tolist()):
                for index, down in enumerate(lora_a_stacked if slot >= 0 else ()):
                    y[index, token] = down[slot, 0] @ x[token] * scale

        def add_expand(self, y, x, lora_b_stacked, output_slices, offset_start=0, add_inputs=True, **kwargs):
            for token, slot in enumerate(self.token_lora_indices.tolist()):
                ups = [up[slot, 0] @ x[index, token] for index, up in enumerate(lora_b_stacked)] if slot >= 0 else []
                if ups:
                    y[token] = torch.cat(ups) + (y[token] if add_inputs else 0)

        def add_lora_linear(
            self, y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, *, buffer=None, **kwargs
        ):
            raise AssertionError("vLLM's own form for CPUs is wrong for tokens without an adapter")

    class Weights:
        def __init__(self, module_name, rank, lora_alpha, lora_a, lora_b, scaling=None):
            self.module_name, self.rank, self.lora_a, self.lora_b = module_name, rank, lora_a, lora_b
            self.scaling = lora_alpha / rank if scaling is None else scaling

    class Lora:
        def __init__(self, lora_model_id, rank, loras, is_3d_lora_weight=False, *, modules_to_save=None):
            self.id, self.rank, self.loras = lora_model_id, rank, loras

    class Manager:
        def __init__(self, model, max_num_seqs, max_num_batched_tokens, vocab_size, lora_config, device, vllm_config):
            self.model, self.lora_config, self.device = model, lora_config, device
            self.lora_index_to_id, self._registered_adapters = [None] * SLOTS, {}
            self.packed_modules = {
                name: [name.removesuffix(end) + member for member in PACKED[end]]
                for name in model.linears
                if (end := name.rpartition(".")[2]) in PACKED
            }
            self.modules, self.shared = dict(model.linears), Punica()
            for layer in self.modules.values():
                layer.set_mapping(self.shared)

        def _get_lora_layer_weights(self, lora_model, module_name):
            return lora_model.loras.get(module_name)

        def add_adapter(self, lora):
            for name, members in self.packed_modules.items():
                found = [lora.loras.pop(member, None) for member in members]
                if any(found):
                    parts = ([one and getattr(one, kind) for one in found] for kind in ("lora_a", "lora_b"))
                    lora.loras[name] = Weights(name, lora.rank, lora.rank, *parts)
            next(iter(lora.loras.values()))  # vLLM asks the first one where it is
            self._registered_adapters[lora.id] = lora

        def activate_adapter(self, lora_id):
            if lora_id in self.lora_index_to_id:
                return False
            index, adapter = self.lora_index_to_id.index(None), self._registered_adapters[lora_id]
            self.lora_index_to_id[index] = lora_id
            for name, layer in self.modules.items():
                weights = self._get_lora_layer_weights(adapter, name)
                layer.set_lora(index, weights.lora_a, weights.lora_b) if weights else layer.reset_lora(index)
            return True

    class Config:
        def compute_hash(self):
            return "hash"

    class Worker:
        def __init__(self, manager):
            self._adapter_manager = manager

        def _load_adapter(self, lora_request):
            """A plain LoRA; tensors of other names are refused."""
            fields = json.loads((Path(lora_request.lora_path) / "adapter_config.json").read_text())
            scale, loras = fields["lora_alpha"] / fields["r"], {}
            tensors = load_file(Path(lora_request.lora_path) / "adapter_model.safetensors")
            for key, a in tensors.items():
                name, is_a = parse_fine_tuned_lora_name(key)
                if is_a:
                    b = tensors[key.replace("lora_A", "lora_B")]
                    loras[name] = Weights(name, len(a), len(a), a, b * scale)
            return Lora(lora_request.lora_int_id, fields["r"], loras)

    def parse_fine_tuned_lora_name(name, weights_mapper=None):
        parts = name.removeprefix("base_model.model.").split(".")
        if parts[-2] not in ("lora_A", "lora_B"):
            raise ValueError(f"{name} is unsupported LoRA weight")
        return ".".join(parts[:-2]), parts[-2] == "lora_A"

    def all_reduce(input_):
        raise AssertionError("nothing is divided here")

    names = {
        "vllm": {"__version__": "0.32.0+cpu"},
        "vllm.envs": {"VLLM_LORA_ENABLE_DUAL_STREAM": False},
        "vllm.config": {},
        "vllm.config.lora": {"LoRAConfig": Config},
        "vllm.distributed": {"tensor_model_parallel_all_reduce": all_reduce},
        "vllm.utils": {},
        "vllm.utils.torch_utils": {"PIN_MEMORY": False},
        "vllm.model_executor": {},
        "vllm.model_executor.models": {},
        "vllm.model_executor.models.utils": {"PPMissingLayer": type("PPMissingLayer", (), {})},
        "vllm.lora": {},
        "vllm.lora.utils": {
            "parse_fine_tuned_lora_name": parse_fine_tuned_lora_name,
            "get_adapter_absolute_path": lambda lora_path: lora_path,
        },
        "vllm.lora.lora_model": {"LoRAModel": Lora},
        "vllm.lora.lora_weights": {"LoRALayerWeights": Weights},
        "vllm.lora.layers": {"ClassificationHeadWithLoRA": Head},
        "vllm.lora.layers.base": {"BaseLayerWithLoRA": Layer},
        "vllm.lora.layers.base_linear": {"BaseLinearLayerWithLoRA": Linear},
        "vllm.lora.layers.row_parallel_linear": {"RowParallelLinearWithLoRA": RowParallel},
        "vllm.lora.punica_wrapper": {},
        "vllm.lora.punica_wrapper.punica_base": {"PunicaWrapperBase": Punica},
        "vllm.lora.model_manager": {"LoRAModelManager": Manager},
        "vllm.lora.worker_manager": {"WorkerLoRAManager": Worker},
    }
    made = {}
    for name, members in names.items():
        made[name] = ModuleType(name)
        vars(made[name]).update(members)
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(made[parent], last, made[name])
    return made
