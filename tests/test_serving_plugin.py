"""The plug-in for vLLM on a stand-in: the names and signatures it uses, and of their behaviour what it builds on."""

from __future__ import annotations

import ast
import copy
import importlib
import importlib.util
import logging
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from loras import edit_config, save_lora
from methods import build
from peft import PeftModel
from safetensors.torch import load_file
from vllm_stand_in import PACKED, RANK, SLOTS, stand_in

from molora.plain.fixed import layers_of
from molora.serving.op import reference
from molora.serving.pack import pack
from molora.serving.tables import SlotTables

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


def changed(vllm):
    """What the plug-in replaces."""
    manager = vllm["vllm.lora.model_manager"].LoRAModelManager
    worker = vllm["vllm.lora.worker_manager"].WorkerLoRAManager
    config = vllm["vllm.config.lora"].LoRAConfig
    return manager.__init__, manager.activate_adapter, worker._load_adapter, config.compute_hash


def holder_of(vllm, name):
    """The object a dotted name ends in, and the last part of the name."""
    module, _, path = name.partition(":")
    found = vllm[module]
    *way, last = path.split(".")
    for step in way:
        found = getattr(found, step)
    return found, last


def table(name):
    """A table of names, read from the file, as the plug-in itself is imported in tests only."""
    for node in ast.parse((PLUGIN / "compatibility.py").read_text()).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == name:
            return node.value.keys if isinstance(node.value, ast.Dict) else node.value.elts
    raise LookupError(name)


def signatures():
    """Names whose parameters are compared."""
    return [ast.literal_eval(key) for key in table("_USED")]


NAMES = [ast.literal_eval(name) for name in table("_NAMES")]


def test_a_vllm_with_the_same_names_and_parameters_fits(plugin):
    assert part("compatibility").differences() == []
    assert part("compatibility").is_tested()
    assert part("compatibility").version() == "0.32.0"


@pytest.mark.parametrize("name", [name for name in signatures() if not name.endswith("__init__")] + NAMES)
def test_a_missing_name_keeps_the_plug_in_off(name, vllm, plugin, caplog):
    delattr(*holder_of(vllm, name))
    stays_off(vllm, plugin, caplog, f"there is no {name.partition(':')[2]}")


@pytest.mark.parametrize("name", signatures())
def test_other_parameters_keep_the_plug_in_off(name, vllm, plugin, caplog):
    holder, last = holder_of(vllm, name)
    setattr(holder, last, lambda self, something, *, else_: None)
    stays_off(vllm, plugin, caplog, f"{name.partition(':')[2]} takes (self, something, else_) instead of (")


def stays_off(vllm, plugin, caplog, expected):
    assert any(expected in found for found in part("compatibility").differences())
    plugin.register()
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    for said in (expected, "0.32.0", "off", "Install one of these versions", "molora export DIR OUT --as lora"):
        assert said in record.getMessage()
    assert "molora_vllm.hooks" not in sys.modules
    hooked = [vllm["vllm.lora.model_manager"].LoRAModelManager, vllm["vllm.lora.worker_manager"].WorkerLoRAManager]
    functions = [function for kind in hooked for function in vars(kind).values()]
    assert not any(hasattr(function, "__wrapped__") for function in functions)


def test_every_name_of_vllm_that_is_imported_is_checked_first(plugin):
    checked = [*signatures(), *NAMES]
    for file in ("adapter.py", "hooks.py", "layer.py"):
        for node in ast.walk(ast.parse((PLUGIN / file).read_text())):
            if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] == "vllm":
                for alias in node.names:
                    name = f"{node.module}:{alias.name}" if node.module != "vllm" else f"vllm.{alias.name}:"
                    assert any(one.startswith(name) for one in checked), f"{file}: {name}"


def test_another_version_that_looks_the_same_is_used_with_a_warning(vllm, plugin, caplog):
    vllm["vllm"].__version__ = "0.99.1"
    before = changed(vllm)
    plugin.register()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "0.99.1" in record.getMessage()
    assert "molora check-serving DIR" in record.getMessage()
    assert all(new is not old for new, old in zip(changed(vllm), before, strict=True))


def test_graphs_compiled_without_the_plug_in_are_others(vllm, plugin):
    config = vllm["vllm.config.lora"].LoRAConfig()
    before = config.compute_hash()
    plugin.register()
    assert config.compute_hash() not in (before, "")
    assert config.compute_hash() == config.compute_hash()


def test_an_engine_whose_modules_cannot_be_read_goes_on(vllm, plugin, caplog, monkeypatch):
    """Plug-ins are called in every engine, with LoRAs or without; none may end for ours."""
    plain = importlib.import_module

    def broken(name):
        if name == "vllm.lora.model_manager":
            raise AttributeError("another vLLM")
        return plain(name)

    monkeypatch.setattr(part("compatibility").importlib, "import_module", broken)
    plugin.register()
    assert "there is no LoRAModelManager" in caplog.records[0].getMessage()


def test_other_devices_keep_what_they_had(vllm, plugin):
    engine = Engine(vllm, plugin, device="meta")
    assert all(layer.punica_wrapper is engine.manager.shared for layer in engine.layers.values())


def test_a_wrapper_can_be_copied(engine):
    wrapper = next(iter(engine.layers.values())).punica_wrapper
    assert copy.copy(wrapper).gates == wrapper.gates
    with pytest.raises(AttributeError):
        wrapper.__deepcopy__  # noqa: B018


def test_registering_twice_installs_once_and_says_nothing(vllm, plugin, caplog):
    plugin.register()
    once = changed(vllm)
    plugin.register()
    assert changed(vllm) == once
    assert not any(hasattr(method.__wrapped__, "__wrapped__") for method in once)
    assert not caplog.records


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


def as_on_gpu(engine):
    """Let an engine go the way of GPUs: vLLM's products, and between them one operation that reads tables."""
    for layer in engine.layers.values():
        wrapper = layer.punica_wrapper
        wrapper.tables = SlotTables(wrapper.slices, SLOTS, RANK)
        for slot in range(SLOTS):
            for index in range(wrapper.slices):
                wrapper.tables.write(slot, index, None)
        wrapper._route = lambda buffer, products, x, slots, tables: reference(buffer, products, x, slots, tables.gates)
    return engine


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


@pytest.mark.parametrize("gpu", [False, True], ids=["cpu", "gpu"])
@pytest.mark.parametrize("name", MIXTURES)
def test_a_batch_of_several_adapters_gets_of_each_token_its_own(name, gpu, engine, adapters):
    engine = as_on_gpu(engine) if gpu else engine
    chosen = [name, "plain", "threshold"]
    slots = {engine.load(adapters(one)[0]): one for one in chosen}
    assert list(slots) == [0, 1, 2]
    tokens = [-1, 0, 2, 1, 0, -1, 2, 2, 0, 1, -1]
    for linear in engine.layers:
        x, y = inputs(engine, linear, len(tokens))
        got = engine.answer(linear, x, tokens, y)
        for slot, one in slots.items():
            here = torch.tensor(tokens) == slot
            close(got[here], y[here] + delta(adapters, one, linear, x[here]))
        alone = torch.tensor(tokens) < 0
        assert torch.equal(got[alone], y[alone])
    assert (got != y).any()


def test_inputs_with_a_batch_dimension_are_tokens_in_a_row(engine, adapters):
    engine.load(adapters("recommended")[0])
    name = MLP.format(0) + "down_proj"
    x, y = inputs(engine, name, 6)
    layer = engine.layers[name]
    engine.step([0] * 6)
    before = y.clone()
    stacks = layer.lora_a_stacked, layer.lora_b_stacked
    layer.punica_wrapper.add_lora_linear(y.view(2, 3, -1), x.view(2, 3, -1), *stacks, 1.0, layer.output_slices)
    close(y, before + delta(adapters, "recommended", name, x))


def test_without_inputs_the_answer_replaces_what_was_there(engine, adapters):
    """What vLLM asks for where it adds by itself; tokens without an adapter are its own to fill."""
    engine.load(adapters("recommended")[0])
    name = ATTENTION.format(1) + "qkv_proj"
    x, y = inputs(engine, name, 5)
    layer = engine.layers[name]
    engine.step([0, 0, -1, 0, 0])
    before, stacks = y.clone(), (layer.lora_a_stacked, layer.lora_b_stacked)
    layer.punica_wrapper.add_lora_linear(y, x, *stacks, 1.0, layer.output_slices, add_inputs=False)
    here = torch.tensor([0, 1, 3, 4])
    close(y[here], delta(adapters, "recommended", name, x[here]))
    assert torch.equal(y[2], before[2])


@pytest.mark.parametrize(
    "names",
    [
        ("recommended", "plain"),
        ("plain", "recommended"),
        ("recommended", "few experts"),
        ("activation", "fixed"),
        ("recommended", "attention only", "threshold", "plain", "cosine"),
    ],
)
def test_a_slot_that_is_used_again_keeps_nothing(names, engine, adapters):
    for name in names:
        slot = engine.load(adapters(name)[0])
        assert slot == 0
        for linear in engine.layers:
            x, y = inputs(engine, linear, 7)
            close(engine.answer(linear, x, [0] * 7, y), y + delta(adapters, name, linear, x))
        engine.free(slot)


def test_a_linear_that_an_adapter_leaves_alone_stays_as_it_was(engine, adapters):
    engine.load(adapters("recommended")[0])
    engine.free(0)
    engine.load(adapters("attention only")[0])
    for linear in (MLP.format(0) + "gate_up_proj", ATTENTION.format(1) + "o_proj"):
        x, y = inputs(engine, linear, 4)
        assert torch.equal(engine.answer(linear, x, [0] * 4, y), y)
    x, y = inputs(engine, ATTENTION.format(0) + "qkv_proj", 4)
    got = engine.answer(ATTENTION.format(0) + "qkv_proj", x, [0] * 4, y)
    changed_columns = (got != y).any(0)
    assert changed_columns[:32].all()
    assert not changed_columns[32:48].any()  # k


def test_routing_is_what_is_served(engine, adapters):
    """The control: with the gates taken away, answers are others."""
    engine.load(adapters("recommended")[0])
    name = MLP.format(1) + "down_proj"
    x, y = inputs(engine, name, 9)
    right = engine.answer(name, x, [0] * 9, y)
    engine.layers[name].punica_wrapper.gates[0] = [None]
    assert (engine.answer(name, x, [0] * 9, y) - right).abs().max() > 1e-2


def test_one_matrix_for_all_slices_routes_them_alike(engine, adapters):
    """A linear that vLLM cuts by itself, such as one for all of q, k and v, has one gate."""
    wrapper = engine.layers[ATTENTION.format(0) + "qkv_proj"].punica_wrapper
    gate, rows = SimpleNamespace(rank=4), torch.zeros(6, 32)
    wrapper.fill(1, SimpleNamespace(lora_a=rows, lora_b=rows.T), [gate])
    assert wrapper.gates[1] == [gate] * 3
    assert wrapper.rows[1] == [6, 6, 6]


def test_tokens_are_taken_slot_by_slot_in_the_order_in_which_they_come(plugin):
    """Processes may hold one adapter in different slots, and have to reduce its products at one time."""
    plugin.register()
    tokens_by_slot = part("layer").tokens_by_slot
    of_one = tokens_by_slot(torch.tensor([2, -1, 0, 2]))
    of_other = tokens_by_slot(torch.tensor([0, -1, 2, 0]))
    assert [(slot, found.tolist()) for slot, found in of_one] == [(2, [0, 3]), (0, [2])]
    assert [found.tolist() for _, found in of_one] == [found.tolist() for _, found in of_other]


def test_a_matrix_that_covers_several_slices_is_spread_over_them(engine):
    """As vLLM's `expand_packed_lora` does: of two members, the first may hold three slices of four."""
    linear = type(engine.layers[ATTENTION.format(0) + "qkv_proj"])(32, [8, 8, 8, 16])
    wrapper = part("layer").RoutedWrapper(engine.manager.shared, linear, None)
    a, b = [torch.zeros(4, 32), torch.zeros(6, 32)], [torch.zeros(24, 4), torch.zeros(16, 6)]
    wrapper.fill(0, SimpleNamespace(lora_a=a, lora_b=b), [None, None])
    assert wrapper.rows[0] == [4, 4, 4, 6]


@pytest.mark.parametrize("name", ["recommended", "threshold", "activation", "plain", "fixed"])
def test_two_processes_that_share_a_linear_answer_as_one(name, vllm, plugin, adapters, monkeypatch):
    """Each sees half of the input; what routes is summed over both, and so are their answers."""
    barrier, parts = threading.Barrier(2, timeout=20), {}

    def all_reduce(input_):
        parts[threading.get_ident()] = input_
        barrier.wait()
        total = sum(parts[key] for key in sorted(parts))
        barrier.wait()
        return input_.copy_(total)  # in place, as on CPUs

    engines = [Engine(vllm, plugin, tp_size=2) for _ in range(2)]
    monkeypatch.setattr(part("layer"), "tensor_model_parallel_all_reduce", all_reduce)
    for linear in (ATTENTION.format(1) + "o_proj", MLP.format(0) + "down_proj"):
        x = torch.randn(5, 2 * engines[0].layers[linear].lora_a_stacked[0].shape[-1])
        halves, answers, failures = x.chunk(2, dim=1), [None, None], []

        def run(number, linear=linear, halves=halves, answers=answers, failures=failures):
            try:
                answers[number] = engines[number].answer(linear, halves[number], [0, -1, 0, 0, 0])
            except Exception as error:
                failures.append(error)
                barrier.abort()

        for number, engine in enumerate(engines):
            for layer in engine.layers.values():
                size = layer.lora_a_stacked[0].shape[-1]
                layer.set_lora = divided(layer, number * size, size)
            if not engine.ids:
                engine.load(adapters(name)[0])
        parts.clear()  # of threads that ended, whose numbers new ones need not have
        threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        here = torch.tensor([0, 2, 3, 4])
        close(sum(answers)[here], delta(adapters, name, linear, x[here]))
        assert not sum(answers)[1].any()
        if name == "recommended":
            monkeypatch.setattr(part("layer"), "tensor_model_parallel_all_reduce", lambda input_: input_)
            alone = [engines[n].answer(linear, halves[n], [0] * 5) for n in range(2)]
            assert (sum(alone)[here] - sum(answers)[here]).abs().max() > 1e-3
            monkeypatch.setattr(part("layer"), "tensor_model_parallel_all_reduce", all_reduce)


def divided(layer, start, size):
    """`set_lora` of one process: it keeps its columns of A."""
    plain = type(layer).set_lora

    def set_lora(index, lora_a, lora_b):
        of_row = len(layer.output_slices) == 1
        plain(layer, index, lora_a[:, start : start + size] if of_row else lora_a, lora_b)

    return set_lora


REFUSALS = {
    "fully sharded": ({"fully_sharded_loras": True}, "recommended", "--fully-sharded-loras.*leave it out"),
    "too small": ({"max_lora_rank": 8}, "recommended", r"rank \d+.*room for 8; start it with --max-lora-rank (\d+)"),
    "restricted": ({"target_modules": ["o_proj"]}, "recommended", "--lora-target-modules allows o_proj only"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_an_engine_cannot_serve_is_refused_with_the_remedy(case, vllm, plugin, adapters):
    fields, name, said = REFUSALS[case]
    engine = Engine(vllm, plugin, **fields)
    if case == "restricted":
        for linear in [linear for linear in engine.layers if not linear.endswith("o_proj")]:
            del engine.manager.modules[linear]
    with pytest.raises(ValueError, match=said) as error:
        engine.load(adapters(name)[0])
    if case == "too small":
        needed = max(len(a) for a in packed_of(adapters, name))
        assert f"rank {needed}," in str(error.value)
        assert f"--max-lora-rank {next(r for r in (16, 32, 64) if r >= needed)}" in str(error.value)


def packed_of(adapters, name):
    layers = layers_of(adapters(name)[1], "default").values()
    return [pack(layer, "default", torch.float32).a for layer in layers]


def test_dual_stream_is_refused(vllm, plugin, adapters):
    engine = Engine(vllm, plugin)
    vllm["vllm.envs"].VLLM_LORA_ENABLE_DUAL_STREAM = True
    with pytest.raises(ValueError, match="VLLM_LORA_ENABLE_DUAL_STREAM; unset it"):
        engine.load(adapters("recommended")[0])


def test_other_devices_are_refused(engine, adapters):
    engine.manager.device = torch.device("meta")
    with pytest.raises(ValueError, match="this is meta"):
        engine.load(adapters("recommended")[0])


def test_a_linear_that_the_engine_does_not_have_is_refused(engine, tmp_path):
    build("mole", target_modules=["q_proj", "o_proj"]).save_pretrained(tmp_path / "adapter")
    del engine.manager.modules[ATTENTION.format(0) + "o_proj"]
    with pytest.raises(ValueError, match=r"adapts .*o_proj, where this engine has no linear for LoRAs"):
        engine.load(tmp_path / "adapter")


def test_a_router_that_normalises_is_refused_where_its_input_is_divided(vllm, plugin, adapters):
    engine = Engine(vllm, plugin, tp_size=2)
    with pytest.raises(ValueError, match=r"o_proj cannot be routed here: .*tensor_parallel_size=1"):
        engine.load(adapters("cosine")[0])


@pytest.fixture
def second_stage(vllm, plugin):
    """An engine with the second layer only, as in a pipeline of two stages."""
    engine = Engine(vllm, plugin)
    missing = vllm["vllm.model_executor.models.utils"].PPMissingLayer()
    engine.manager.model.model = SimpleNamespace(layers=SimpleNamespace(**{"0": missing, "1": SimpleNamespace()}))
    for linear in [linear for linear in engine.layers if ".0." in linear]:
        del engine.manager.modules[linear], engine.layers[linear]
        engine.manager.packed_modules.pop(linear, None)
    return engine


def test_linears_of_another_stage_of_a_pipeline_are_left_out(second_stage, adapters):
    second_stage.load(adapters("recommended")[0])
    for name in second_stage.layers:
        x, y = inputs(second_stage, name, 3)
        close(second_stage.answer(name, x, [0] * 3, y), y + delta(adapters, "recommended", name, x))


def test_an_adapter_of_another_stage_of_a_pipeline_is_loaded_and_changes_nothing(second_stage, tmp_path):
    build("mole", target_modules=["q_proj", "down_proj"], layers_to_transform=[0]).save_pretrained(
        tmp_path / "adapter"
    )
    second_stage.load(tmp_path / "adapter")
    for name in second_stage.layers:
        x, y = inputs(second_stage, name, 3)
        assert torch.equal(second_stage.answer(name, x, [0] * 3, y), y)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"x"), "damaged adapter_model.safetensors"),
        (lambda folder: edit_config(folder, num_experts=3), "does not fit the base model"),
        (lambda folder: edit_config(folder, modules_to_save=["lm_head"]), "cannot be served: it trained more"),
    ],
    ids=["damaged", "other experts", "unservable"],
)
def test_a_folder_that_is_not_whole_is_an_error_for_the_request_alone(spoil, said, engine, tmp_path):
    folder = tmp_path / "adapter"
    build("mole").save_pretrained(folder)
    spoil(folder)
    with pytest.raises(ValueError, match=said) as error:
        engine.load(folder)
    assert str(error.value).startswith("adapter 1: ")
    assert engine.manager.lora_index_to_id == [None] * SLOTS


def test_a_config_that_cannot_be_read_is_named(plugin, tmp_path):
    plugin.register()
    (tmp_path / "adapter_config.json").write_text('{"r": 4,')
    with pytest.raises(ValueError, match=r"adapter_config\.json cannot be read"):
        part("adapter").holds_mixture(str(tmp_path))


@pytest.mark.parametrize("text", ["[]", '{"peft_type": "LORA"}', "{}", None])
def test_a_folder_that_says_no_mixture_is_vllms_to_read(text, plugin, tmp_path):
    plugin.register()
    if text is not None:
        (tmp_path / "adapter_config.json").write_text(text)
    assert not part("adapter").holds_mixture(str(tmp_path))


def test_without_the_plug_in_a_mixture_is_refused(vllm, adapters):
    """Its tensors have names that vLLM does not know, so it is never served without its routing."""
    worker = vllm["vllm.lora.worker_manager"].WorkerLoRAManager(None)
    folder, _ = adapters("recommended")
    for key in load_file(folder / "adapter_model.safetensors"):
        with pytest.raises(ValueError, match="unsupported LoRA weight"):
            vllm["vllm.lora.utils"].parse_fine_tuned_lora_name(key)
    with pytest.raises((ValueError, KeyError)):
        worker._load_adapter(SimpleNamespace(lora_path=str(folder), lora_int_id=1))


def test_everything_else_is_asked_of_vllms_wrapper(engine):
    wrapper = engine.layers[ATTENTION.format(0) + "o_proj"].punica_wrapper
    engine.manager.shared.something = object()
    assert wrapper.something is engine.manager.shared.something
    with pytest.raises(AttributeError):
        _ = wrapper.nothing


def test_classification_heads_keep_vllms_wrapper(vllm, plugin):
    plugin.register()
    head = vllm["vllm.lora.layers"].ClassificationHeadWithLoRA(32, [3])
    config = SimpleNamespace(config=None, linears={"score": head})
    whole = SimpleNamespace(model_config=SimpleNamespace(hf_config=None))
    manager = vllm["vllm.lora.model_manager"].LoRAModelManager(config, 1, 1, 1, None, torch.device("cpu"), whole)
    assert head.punica_wrapper is manager.shared


def test_importing_the_plug_in_imports_neither_torch_nor_molora(tmp_path):
    """In a process of its own: every process of a server imports it, mixtures or not."""
    script = tmp_path / "script.py"
    script.write_text(
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('molora_vllm', {str(PLUGIN / '__init__.py')!r})\n"
        "spec.loader.exec_module(importlib.util.module_from_spec(spec))\n"
        "print([name for name in sys.modules if name.partition('.')[0] in ('torch', 'molora', 'vllm')])\n"
    )
    found = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=True)
    assert found.stdout.strip() == "[]"


def test_molora_is_imported_when_a_mixture_is_loaded(plugin):
    """No module of the plug-in imports it at its head, nor what imports it."""
    for file in PLUGIN.glob("*.py"):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                module = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
                assert module.partition(".")[0] != "molora", file.name
