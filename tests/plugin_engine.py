"""What tests of the plug-in for vLLM share: the plug-in on a stand-in, an engine with it, and adapters to serve.

A file of tests names the fixtures that it uses, and those that they ask for: `vllm = plugin_engine.vllm`.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from loras import save_lora
from methods import build
from peft import PeftModel
from vllm_stand_in import PACKED, RANK, SLOTS, stand_in

from molora.plain.fixed import layers_of

PLUGIN = Path(__file__).parents[1] / "serving"
ATTENTION, MLP = "model.layers.{}.self_attn.", "model.layers.{}.mlp."
SIZES = {"q_proj": 32, "k_proj": 16, "v_proj": 16, "gate_proj": 64, "up_proj": 64, "o_proj": 32, "down_proj": 32}
LINEARS = [(ATTENTION, "qkv_proj", 32), (ATTENTION, "o_proj", 32), (MLP, "gate_up_proj", 32), (MLP, "down_proj", 64)]


@pytest.fixture
def vllm(monkeypatch):
    """The stand-in, importable, and the plug-in not imported yet."""
    modules = stand_in()
    for name in [name for name in sys.modules if name.partition(".")[0] in ("vllm", "molora_vllm")]:
        monkeypatch.delitem(sys.modules, name)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    yield modules
    for name in [name for name in sys.modules if name.partition(".")[0] == "molora_vllm"]:
        del sys.modules[name]


@pytest.fixture
def plugin(vllm):
    """The plug-in, imported from its folder, whatever is installed."""
    places = [str(PLUGIN)]
    spec = importlib.util.spec_from_file_location(
        "molora_vllm", PLUGIN / "__init__.py", submodule_search_locations=places
    )
    module = sys.modules["molora_vllm"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def part(name):
    return importlib.import_module(f"molora_vllm.{name}")


class Engine:
    """A model of a tiny Llama's linears, with the plug-in installed before its manager is made."""

    def __init__(self, vllm, plugin, tp_size=1, device="cpu", **lora_config):
        plugin.register()
        linear = vllm["vllm.lora.layers.base_linear"].BaseLinearLayerWithLoRA
        row = vllm["vllm.lora.layers.row_parallel_linear"].RowParallelLinearWithLoRA
        self.layers = {}
        for place, end, size in LINEARS:
            for number in range(2):
                widths = [SIZES[member] for member in PACKED.get(end, [end])]
                divided = end in ("o_proj", "down_proj")
                kind, parts = (row, tp_size) if divided else (linear, 1)
                self.layers[place.format(number) + end] = kind(size // parts, widths, tp_size=tp_size)
        config = tiny.tiny_llama().config
        config.architectures = ["LlamaForCausalLM"]
        fields = {
            "max_lora_rank": RANK,
            "fully_sharded_loras": False,
            "lora_dtype": torch.float32,
            "target_modules": None,
        }
        manager = vllm["vllm.lora.model_manager"].LoRAModelManager
        model = SimpleNamespace(config=config, linears=self.layers)
        settings = SimpleNamespace(**fields | lora_config)
        whole = SimpleNamespace(model_config=SimpleNamespace(hf_config=config))
        self.manager = manager(model, 4, 64, 100, settings, torch.device(device), whole)
        self.worker = vllm["vllm.lora.worker_manager"].WorkerLoRAManager(self.manager)
        self.ids = 0

    def load(self, folder):
        """Put an adapter into the next free slot."""
        self.ids += 1
        request = SimpleNamespace(lora_name=f"adapter {self.ids}", lora_path=str(folder), lora_int_id=self.ids)
        self.manager.add_adapter(self.worker._load_adapter(request))
        assert self.manager.activate_adapter(self.ids)
        return self.manager.lora_index_to_id.index(self.ids)

    def free(self, slot):
        self.manager.lora_index_to_id[slot] = None

    def step(self, slots):
        """Say which slot every token of the next step is in."""
        self.manager.shared.update_metadata(slots, self.manager.lora_index_to_id, SLOTS + 1, 100)

    def answer(self, name, x, slots, y=None):
        """What a linear makes of the base model's output y."""
        layer = self.layers[name]
        self.step(slots)
        y = torch.zeros(len(x), sum(layer.output_slices)) if y is None else y.clone()
        return layer._apply_lora_to_output(x, y)


@pytest.fixture
def engine(vllm, plugin):
    return Engine(vllm, plugin)


MIXTURES = {
    "recommended": ("recommended", {}),
    "attention only": ("mole", {"target_modules": ["q_proj", "v_proj"], "r": [3, 1, 2, 2]}),
    "few experts": ("mole", {"num_experts": 2, "r": 1, "selection": "dense"}),
    "threshold": ("adamole", {}),
    "cosine": ("mole", {"router": "cosine"}),
    "activation": ("flylora", {}),
    "fixed": ("static", {}),
    "shared input": ("mole", {"router_sharing": "input"}),
}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Folders by name, and models to compare with."""
    made = {}

    def make(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("adapters") / name
            if name == "plain":
                save_lora(folder, seed=4, r=8, lora_alpha=24, target_modules="all-linear")
                model = PeftModel.from_pretrained(tiny.tiny_llama(), folder).eval()
            else:
                preset, fields = MIXTURES[name]
                model = build(preset, **fields)
                model.save_pretrained(folder)
            made[name] = folder, model
        return made[name]

    return make


@torch.no_grad()
def delta(adapters, name, linear, x):
    """What an adapter adds to a linear of vLLM's, slice by slice, by the model it was trained on."""
    place, _, end = linear.rpartition(".")
    members = PACKED.get(end, [end])
    _, model = adapters(name)
    added = []
    for member in members:
        key = f"{place}.{member}"
        if name == "plain":
            layer = model.get_base_model().get_submodule(key)
            added.append(layer.lora_B["default"](layer.lora_A["default"](x)) * layer.scaling["default"])
            continue
        layer = layers_of(model, "default").get(key)
        added.append(torch.zeros(len(x), SIZES[member]) if layer is None else layer.delta("default", x))
    return torch.cat(added, dim=1)


def inputs(engine, name, tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    layer = engine.layers[name]
    x = torch.randn(tokens, layer.lora_a_stacked[0].shape[-1], generator=generator)
    return x, torch.randn(tokens, sum(layer.output_slices), generator=generator)


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
