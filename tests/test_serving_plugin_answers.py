"""The plug-in for vLLM on a stand-in: every token gets what its own adapter adds, in batches, processes and stages."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import plugin_engine
import pytest
import torch
from methods import build
from plugin_engine import ATTENTION, MIXTURES, MLP, Engine, close, delta, inputs, part
from vllm_stand_in import RANK, SLOTS

from molora.serving.op import reference
from molora.serving.tables import SlotTables

vllm, plugin, engine, adapters = plugin_engine.vllm, plugin_engine.plugin, plugin_engine.engine, plugin_engine.adapters


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
