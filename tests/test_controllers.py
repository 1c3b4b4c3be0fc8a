"""What changes between steps: balancing biases, coefficients, schedules."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import kinds
import pytest
import torch
from torch import nn
from transformers import TrainerState

from molora.errors import MoloraError
from molora.routing.balance import THRESHOLD_RATE, balanced_bias, steered_threshold
from molora.routing.masks import TokenMasks
from molora.routing.record import RoutingRecord
from molora.routing.route import Routing
from molora.routing.schedules import schedule_problems, scheduled_value
from molora.routing.stacked import stack_records
from molora.trainers import RoutingControlCallback, RoutingScheduleCallback
from molora.trainers.control import _adapted, refuse_to_move_thresholds
from molora.trainers.counts import LinearCounts, StepCounts


def test_the_bias_moves_towards_the_experts_that_are_short_of_tokens():
    bias = torch.tensor([0.0, 1.0, -1.0, 0.5])
    moved = balanced_bias(bias, torch.tensor([6.0, 2.0, 0.0, 0.0]), 0.25)
    assert moved.tolist() == [-0.25, 1.0, -0.75, 0.75]


def test_an_even_load_moves_no_bias_however_large_the_counts():
    counts = torch.full((3,), 16777217, dtype=torch.int64)
    assert balanced_bias(torch.zeros(3), counts, 1.0).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("bias", "active", "expected"),
    [
        (0.5, 2.0, 0.5),  # as wanted
        (0.5, 8.0, 0.5 + 0.1),  # too many by more than a factor e: a whole step up
        (0.5, 0.0, 0.5 - 0.1),  # none at all: a whole step down
        (0.5, 2.0 * 1.5, 0.5 + 0.1 * 0.405465),
        (0.5, 2.0 / 1.5, 0.5 - 0.1 * 0.405465),  # as far off
        (7.95, 8.0, 8.0),  # no further
        (9.0, 8.0, 9.0),  # was there already
        (9.0, 0.0, 8.9),  # comes back at once
        (-8.0, 0.0, -8.0),
    ],
)
def test_a_threshold_rises_while_more_experts_than_wanted_are_active(bias, active, expected):
    moved = steered_threshold(torch.tensor([bias]), torch.tensor(active), 2.0)
    assert THRESHOLD_RATE == 0.1
    torch.testing.assert_close(moved, torch.tensor([expected]))


def test_a_bias_in_16_bits_stays_in_16_bits():
    moved = steered_threshold(torch.tensor([0.5], dtype=torch.bfloat16), torch.tensor(8.0), 2.0)
    assert moved.dtype == torch.bfloat16
    assert moved.item() == pytest.approx(0.6, abs=2e-3)


@dataclass(frozen=True)
class Spec:
    top_k: int = 8
    temperature: float = 1.0


class Layer(nn.Module):
    routing_scope = None

    def __init__(self, *adapters):
        super().__init__()
        self.molora_spec = dict.fromkeys(adapters, Spec())
        plan = SimpleNamespace(reads={"input"}, num_experts=3, spec=SimpleNamespace(null_experts=0))
        self.molora_plan = dict.fromkeys(adapters, plan)
        self.molora_bias = nn.ModuleDict({name: nn.Module() for name in adapters})
        for bias in self.molora_bias.values():
            bias.weight = nn.Parameter(torch.zeros(3), requires_grad=False)
        self.molora_threshold = nn.ModuleDict({name: nn.Linear(2, 1) for name in adapters})
        for net in self.molora_threshold.values():
            nn.init.zeros_(net.bias)


class Model(nn.Module):
    active_adapters = ("x",)

    def __init__(self, **config):
        super().__init__()
        self.a, self.b, self.plain = Layer("x", "frozen"), Layer("x"), nn.Linear(2, 2)
        self.peft_config = {name: SimpleNamespace(**config) for name in ("x", "frozen")}

    def bias(self, layer, adapter="x"):
        return getattr(self, layer).molora_bias[adapter].weight.tolist()

    def threshold(self, layer, adapter="x"):
        return getattr(self, layer).molora_threshold[adapter].bias


def decisions(layer, experts, mask=None):
    p = torch.nn.functional.one_hot(torch.tensor([experts]), 3).float()
    return stack_records([RoutingRecord(layer, "x", Routing(p, p, p > 0, p), TokenMasks(mask))])


def begun(model, **losses):
    """A controller at the start of a training, and the trainer's state, as a checkpoint would keep it."""
    callback, state = RoutingControlCallback(), TrainerState()
    for config in model.peft_config.values():
        config.routing_losses = losses
    callback.on_train_begin(None, state, None)
    return callback, state


def test_biases_move_once_a_step_by_the_real_tokens_of_all_its_micro_batches():
    model = Model(balance_bias_rate=0.5)
    callback, _ = begun(model)
    callback.counts.add("x", decisions("a", [0, 1, 1]))
    callback.counts.start_micro_batch()
    callback.counts.add("x", decisions("a", [0, 0, 2, 2], torch.tensor([[1, 1, 0, 0]])))
    callback.on_optimizer_step(None, None, None, model=model)
    assert model.bias("a") == [-0.5, 0.0 - 0.5 * (2 > 5 / 3), 0.5]
    assert model.bias("b") == model.bias("a", "frozen") == [0, 0, 0]  # saw no token; is not active
    callback.on_optimizer_step(None, None, None, model=model)
    assert model.bias("a") == [-0.5, -0.5, 0.5], "counted anew"


def test_without_a_rate_no_bias_moves():
    model = Model()
    callback, _ = begun(model)
    callback.counts.add("x", decisions("a", [0, 0]))
    callback.on_optimizer_step(None, None, None, model=model)
    assert model.bias("a") == [0, 0, 0]


def test_thresholds_move_once_a_step_by_the_experts_of_its_real_tokens():
    model = Model(experts_per_token=1.0)
    callback, _ = begun(model)
    p = torch.ones(1, 2, 3)  # all three of each token
    for mask in (None, torch.tensor([[1, 0]])):
        record = RoutingRecord("a", "x", Routing(p, p, p > 0, p), TokenMasks(mask))
        callback.counts.start_micro_batch()
        callback.counts.add("x", stack_records([record]))
    callback.on_optimizer_step(None, None, None, model=model)
    assert model.threshold("a").item() == pytest.approx(THRESHOLD_RATE)  # log 3 is more than a whole step
    assert model.threshold("b").item() == model.threshold("a", "frozen").item() == 0.0  # saw no token; is not active
    callback.counts.add("x", decisions("a", [0, 1]))
    callback.on_optimizer_step(None, None, None, model=model)
    assert model.threshold("a").item() == pytest.approx(THRESHOLD_RATE), "one a token is what is wanted"
    assert model.bias("a") == [0, 0, 0]


def test_null_experts_are_none_of_those_wanted():
    model = Model(experts_per_token=1.0)
    model.a.molora_plan["x"].num_experts, model.a.molora_plan["x"].spec.null_experts = 1, 2
    callback, _ = begun(model)
    callback.counts.add("x", decisions("a", [0, 1, 2, 2]))  # a quarter of the tokens has a true expert
    callback.on_optimizer_step(None, None, None, model=model)
    assert model.threshold("a").item() == pytest.approx(-THRESHOLD_RATE)


@pytest.mark.parametrize(("wanted", "kept"), [(1.0, 0.0), (None, 1.0)])
def test_a_steered_threshold_has_no_gradient_of_its_own(wanted, kept):
    model = Model(experts_per_token=wanted)
    callback, _ = begun(model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    callback.on_pre_optimizer_step(None, None, None, model=model)
    net = model.a.molora_threshold["x"]
    assert (net.bias.grad.item(), net.weight.grad.tolist()) == (kept, [[1.0, 1.0]])
    assert model.threshold("a", "frozen").grad.item() == 1.0


def thresholds_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "molora_threshold" in name}


def steered(folder, steps, **arguments):
    """A trainer of eight experts that a token uses all of at first, and is to use two of."""
    fields = {"num_experts": 8, "experts_per_token": 2.0, "max_threshold": 0.5, "threshold_start": 0.02}
    kept = {"init_weights": False, "router_init": "normal", "router_init_range": 0.15}
    model = kinds.model_for("sft", kinds.config("adamole", **fields, **kept))
    return kinds.trainer_for("sft", folder, model, max_steps=steps, learning_rate=1e-3, **arguments)


def test_a_token_uses_as_many_experts_as_are_wanted_after_a_while(tmp_path):
    trainer = steered(tmp_path, 70)
    trainer.train()
    used = [entry["molora/experts_per_token"] for entry in trainer.state.log_history if "loss" in entry]
    assert used[0] > 7.9
    assert all(1.7 < value < 2.3 for value in used[-20:]), used


def test_a_resumed_training_goes_on_with_its_thresholds(tmp_path):
    saved = {"save_strategy": "steps", "save_steps": 3}
    straight = steered(tmp_path / "a", 6, **saved)
    straight.train()
    resumed = steered(tmp_path / "b", 6, **saved)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    one, other = thresholds_of(straight.model), thresholds_of(resumed.model)
    assert one.keys() == other.keys() != set()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("deepspeed", "fsdp", "wanted", "words"),
    [
        (True, None, 2.0, "DeepSpeed's optimizer has a copy"),
        (False, 1, 2.0, "FSDP 1 cuts up"),
        (False, 2, 2.0, None),
        (False, None, 2.0, None),
        (True, None, None, None),
    ],
)
def test_thresholds_are_steered_only_where_they_can_be_changed(deepspeed, fsdp, wanted, words):
    plugin = None if fsdp is None else SimpleNamespace(fsdp_version=fsdp)
    accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin))
    trainer = SimpleNamespace(
        model=Model(experts_per_token=wanted), accelerator=accelerator, is_deepspeed_enabled=deepspeed
    )
    if words is None:
        refuse_to_move_thresholds(trainer)
    else:
        with pytest.raises(MoloraError, match=f"experts_per_token of adapter 'x'.*{words}.*FSDP2 or DDP"):
            refuse_to_move_thresholds(trainer)


def test_counts_of_a_step_tell_its_last_micro_batch_apart():
    model, counts = Model(), StepCounts()
    for experts in ([0, 1, 1], [2, 2]):
        counts.start_micro_batch()
        counts.add("x", decisions("a", experts))
    everyones = counts.everyones(model, ["x"])
    assert list(everyones) == [("x", "a"), ("x", "b")]
    of_a = everyones["x", "a"]
    assert (of_a.selected.tolist(), of_a.tokens.item(), of_a.tokens_now.item()) == ([1, 2, 2], 5, 2)
    assert everyones["x", "b"].selected.tolist() == [0, 0, 0]


def test_null_experts_are_one_another_to_adaptive_coefficients():
    counts = LinearCounts(torch.tensor([10.0, 10, 30, 0, 0]), torch.tensor(50.0), torch.tensor(50.0), 3)
    numbers = {"factor": 1.0, "maximum": 1.0, "decay": 0.0, "capacity": 1.0}
    assert _adapted(0.5, {("x", "a"): counts}, numbers) == {"a": 0.0}


L1 = {"l1_sparsity": {"coefficient": 1e-8, "experts_per_token": 2, "alpha": 2.0}}


@pytest.mark.parametrize(
    ("rounds", "expected"),
    [([[0, 1, 2]], 0.5e-8), ([[0]] * 3, 0.125e-8)],
    ids=["fewer than wanted", "again and again"],
)
def test_the_sparsity_coefficient_follows_the_number_of_active_experts(rounds, expected):
    model = Model()
    callback, state = begun(model, **L1)
    for experts in rounds:
        callback.counts.add("x", decisions("a", experts))
        callback.on_optimizer_step(None, None, None, model=model)
    assert callback.coefficients("x", L1, 0, 1) == {"l1_sparsity": pytest.approx(expected)}
    assert state.stateful_callbacks["molora"]["coefficients"]["x"]["l1_sparsity"] == pytest.approx(expected)


ADAPTIVE = {"load_balancing": {"coefficient": 0.0, "adaptive": {"factor": 3.0, "maximum": 1.0, "decay": 0.5}}}


def test_each_linear_is_balanced_as_much_as_it_needs():
    model = Model()
    callback, _ = begun(model, **ADAPTIVE)
    callback.counts.add("x", decisions("a", [0, 0, 0]))  # 2/3 of the selections are too many
    callback.counts.add("x", decisions("b", [0, 1, 2]))
    callback.on_optimizer_step(None, None, None, model=model)
    assert callback.coefficients("x", ADAPTIVE, 0, 1) == {
        "load_balancing": {"a": pytest.approx(0.5 * min(3 * 2 / 3, 1)), "b": 0.0}
    }


@pytest.mark.parametrize("losses", [L1, ADAPTIVE])
def test_a_resumed_training_goes_on_with_its_coefficients(losses, tmp_path):
    model = Model()
    callback, state = begun(model, **losses)
    for _ in range(2):
        callback.counts.add("x", decisions("a", [0, 0]))
        callback.on_optimizer_step(None, None, None, model=model)
    state.save_to_json(str(tmp_path / "trainer_state.json"))
    resumed = RoutingControlCallback()
    resumed.counts.add("x", decisions("a", [1]))  # of a training before
    resumed.on_train_begin(None, TrainerState.load_from_json(str(tmp_path / "trainer_state.json")), None)
    assert resumed.coefficients("x", losses, 0, 1) == callback.coefficients("x", losses, 0, 1)
    assert resumed.counts.everyones(model, ["x"])["x", "a"].tokens == 0


@pytest.mark.parametrize(
    ("field", "schedule", "values"),
    [
        ("top_k", {"start": 8, "end": 2}, [8, 7, 5, 4, 2]),
        ("top_k", {"start": 1, "end": 4, "until": 0.6}, [1, 3, 4, 4, 4]),
        ("temperature", {"start": 2.0, "end": 1.0}, [2.0, 1.75, 1.5, 1.25, 1.0]),
        ("temperature", {"start": 16.0, "end": 1.0, "shape": "exponential"}, [16, 8, 4, 2, 1]),
        ("router_noise", {"start": 1.0, "end": 0.0, "shape": "cosine"}, [1, 0.853553, 0.5, 0.146447, 0]),
        ("threshold", {"start": 0.1, "end": 0.2, "until": 0.01}, [0.2] * 5),
    ],
)
def test_schedules_go_from_start_to_end(field, schedule, values):
    assert not list(schedule_problems({field: schedule}))
    got = [scheduled_value(field, schedule, step, 5) for step in range(5)]
    assert got == pytest.approx(values, abs=1e-6)
    assert all(isinstance(value, int) for value in got) == (field == "top_k")


def test_the_end_is_reached_exactly_and_with_the_last_step_of_the_share():
    schedule = {"start": 0.3, "end": 0.1, "until": 0.1}
    assert [scheduled_value("top_p", schedule, step, 30) == 0.1 for step in range(4)] == [False, False, True, True]


@pytest.mark.parametrize(
    ("schedules", "words"),
    [
        (3, "must map names of fields"),
        ({"topk": {}}, "Did you mean 'top_k'"),
        ({"top_k": 2}, "top_k: got 2"),
        ({"top_k": {"start": 2}}, "top_k.end: is missing"),
        ({"top_k": {"start": 2.5, "end": 1}}, "top_k.start: got 2.5; must be an integer"),
        ({"top_p": {"start": 0, "end": 1}}, "top_p.start"),
        ({"temperature": {"start": 0, "end": 1}}, "temperature.start"),
        ({"expert_dropout": {"start": 1, "end": 0}}, "expert_dropout.start"),
        ({"top_k": {"start": 2, "end": 1, "untill": 1}}, "Did you mean 'until'"),
        ({"top_k": {"start": 2, "end": 1, "until": 50}}, "a share of all steps"),
        ({"top_k": {"start": 2, "end": 1, "shape": "line"}}, "Did you mean 'linear'"),
        ({"router_noise": {"start": 1, "end": 0, "shape": "exponential"}}, "never reaches"),
    ],
)
def test_impossible_schedules_are_explained(schedules, words):
    problems = list(schedule_problems(schedules))
    assert any(words in problem for problem in problems), problems
    with pytest.raises(MoloraError, match="impossible schedules"):
        RoutingScheduleCallback(schedules)


SCHEDULES = {"top_k": {"start": 8, "end": 2}, "temperature": {"start": 2.0, "end": 1.0}}


@pytest.mark.parametrize("from_config", [True, False])
def test_a_schedule_changes_layers_and_config_and_depends_on_the_step_alone(from_config):
    model = Model(**({"routing_schedules": SCHEDULES} if from_config else {}))
    callback = RoutingScheduleCallback(*([] if from_config else [SCHEDULES]))
    for step, top_k, temperature in ((2, 5, 1.5), (4, 2, 1.0)):
        callback.on_step_begin(None, SimpleNamespace(global_step=step, max_steps=5), None, model=model)
        assert model.a.molora_spec["x"] == model.b.molora_spec["x"] == Spec(top_k, temperature)
        assert (model.peft_config["x"].top_k, model.peft_config["x"].temperature) == (top_k, temperature)
    assert model.a.molora_spec["frozen"] == Spec()
