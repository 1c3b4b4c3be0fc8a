"""Routers learn at a rate of their own: parameter groups by `router_lr_ratio`."""

from __future__ import annotations

import logging

import kinds
import pytest
import torch
from datasets import Dataset
from routers import adapted, assert_same, trainer_for, values
from torch import nn

from molora import MoLoraConfig, MoloraError
from molora.trainers import MoLoraTrainer
from molora.trainers.groups import split_groups

RATIO = 4.0
ROUTING = ("molora_router", "molora_threshold", "molora_blend")


def is_routing(name: str) -> bool:
    return any(part in name for part in ROUTING)


def rates(trainer) -> dict[str, float]:
    """The learning rate of every trained parameter, by its name."""
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    return {names[p]: group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]}


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant_with_warmup"])
def test_routers_learn_at_their_own_rate_in_every_step(kind, tmp_path):
    seen = []

    class Watching(MoLoraTrainer):
        def training_step(self, *args, **kwargs):
            seen.append(rates(self))
            return super().training_step(*args, **kwargs)

    arguments = {"max_steps": 6, "warmup_steps": 2, "lr_scheduler_type": kind, "weight_decay": 0.1}
    trainer = trainer_for(tmp_path, adapted(router_lr_ratio=RATIO), trainer_class=Watching, **arguments)
    plain = trainer_for(tmp_path, adapted(), **arguments)
    trainer.train()
    plain.train()
    assert set(seen[0]) == {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    for step in seen:
        base = {rate for name, rate in step.items() if not is_routing(name)}
        raised = {rate for name, rate in step.items() if is_routing(name)}
        assert len(base) == 1
        assert raised == {RATIO * base.pop()}
    assert max(max(step.values()) for step in seen) > 0
    logged, unchanged = ([e["learning_rate"] for e in t.state.log_history if "loss" in e] for t in (trainer, plain))
    assert logged == unchanged, "the rate in the log is that of the experts"


def test_weight_decay_stays_what_the_trainer_chose(tmp_path):
    def decays(model):
        trainer = trainer_for(tmp_path, model, weight_decay=0.1)
        names = {parameter: name for name, parameter in model.named_parameters()}
        groups = trainer.create_optimizer().param_groups
        return {names[p]: group["weight_decay"] for group in groups for p in group["params"]}

    assert decays(adapted(router_lr_ratio=RATIO)) == decays(adapted())
    assert set(decays(adapted()).values()) == {0.0, 0.1}


@pytest.mark.parametrize(
    ("preset", "parts"), [("adamole", {"molora_router", "molora_threshold"}), ("mor1e", {"molora_blend"})]
)
def test_a_step_of_sgd_is_as_many_times_as_long_as_the_ratio_says(preset, parts, tmp_path):
    rows = [{**row, "expert_scores": [0.1, 0.4, 0.2, 0.3]} for row in kinds.causal(4)]

    def moved(**fields):
        model = adapted(preset, **fields)
        before = values(model)
        arguments = {"optim": "sgd", "max_steps": 1, "max_grad_norm": 0.0, "learning_rate": 1.0}
        trainer_for(tmp_path, model, Dataset.from_list(rows), **arguments).train()
        return {name: value - before[name] for name, value in values(model).items()}

    once, raised = moved(), moved(router_lr_ratio=RATIO)
    for name, step in once.items():
        factor = RATIO if is_routing(name) else 1.0
        torch.testing.assert_close(
            raised[name], factor * step, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert all(any(part in name and once[name].abs().max() > 1e-4 for name in once) for part in parts)


def test_a_ratio_of_one_makes_the_groups_of_the_trainer(tmp_path):
    optimizer = trainer_for(tmp_path, adapted()).create_optimizer()
    raised = trainer_for(tmp_path, adapted(router_lr_ratio=RATIO)).create_optimizer()
    assert [len(optimizer.param_groups), len(raised.param_groups)] == [2, 4]


def test_other_adapters_are_left_alone(tmp_path):
    model = adapted(router_lr_ratio=RATIO)
    model.add_adapter("other", MoLoraConfig.from_preset("adamole", num_experts=2, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "other"])
    trainer = trainer_for(tmp_path, model, learning_rate=1.0)
    trainer.create_optimizer()
    by_name = rates(trainer)
    assert {rate for name, rate in by_name.items() if is_routing(name) and ".default." in name} == {RATIO}
    assert {rate for name, rate in by_name.items() if ".other." in name} == {1.0}


def test_a_resumed_training_goes_on_with_the_same_groups(tmp_path):
    arguments = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "cosine"}
    straight = trainer_for(tmp_path / "a", adapted(router_lr_ratio=RATIO), **arguments)
    straight.train()
    resumed = trainer_for(tmp_path / "b", adapted(router_lr_ratio=RATIO), **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert_same(values(resumed.model), values(straight.model))
    one, other = straight.optimizer.state_dict(), resumed.optimizer.state_dict()
    assert one["param_groups"] == other["param_groups"]
    for index, state in one["state"].items():
        assert_same(state, other["state"][index])


def test_training_twice_keeps_the_groups_and_warns_of_nothing(tmp_path, caplog):
    trainer = trainer_for(tmp_path, adapted(router_lr_ratio=RATIO))
    with caplog.at_level(logging.WARNING, "molora.trainers.groups"):
        trainer.create_optimizer_and_scheduler(2)
        trainer.train()
        trainer.train()
    assert len(trainer.optimizer.param_groups) == 4
    assert not caplog.records


def test_an_optimizer_from_outside_is_left_alone_with_a_warning(tmp_path, caplog):
    model = adapted(router_lr_ratio=RATIO)
    given = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    trainer = trainer_for(tmp_path, model, optimizers=(given, None))
    with caplog.at_level(logging.WARNING, "molora.trainers.groups"):
        trainer.train()
    assert len(given.param_groups) == 1
    assert [record.getMessage() for record in caplog.records if "router_lr_ratio of 'default'" in record.getMessage()]


class Elsewhere:
    """Keeps its parameters to itself, as optimizers that step in hooks do."""

    param_groups = ({"params": [], "lr": 1.0},)


class WithoutRate(torch.optim.SGD):
    def __init__(self, params):
        super().__init__(params, lr=1.0)
        self.param_groups[0]["lr"] = None


@pytest.mark.parametrize(
    ("optimizer", "words"),
    [
        (lambda model: Elsewhere(), "Elsewhere does not keep them"),
        (lambda model: WithoutRate(model.parameters()), "WithoutRate finds its learning rate by itself"),
    ],
)
def test_optimizers_that_cannot_keep_a_ratio_are_refused(optimizer, words):
    model = adapted()
    with pytest.raises(MoloraError, match=rf"router_lr_ratio=4 of adapter 'default' cannot be kept: {words}"):
        split_groups(optimizer(model), model, {"default": RATIO})


def test_an_optimizer_that_steps_in_the_backward_pass_is_refused(tmp_path):
    trainer = trainer_for(tmp_path, adapted(router_lr_ratio=RATIO))
    trainer.create_optimizer()  # one that is installed
    trainer.optimizer, trainer.args.optim = None, "adalomo"
    trainer.get_optimizer_cls_and_kwargs = lambda args, model: (torch.optim.SGD, {"lr": 1.0})
    with pytest.raises(MoloraError, match="LOMO steps in the backward pass"):
        trainer.create_optimizer()


def flattened(path: list[str], names: list[str]) -> nn.Module:
    """A model in which FSDP 1 has made one vector of some parameters of a module."""
    model = at = nn.Module()
    for part in [*path, "_fsdp_wrapped_module"]:
        setattr(at, part, nn.Module())
        at = getattr(at, part)
    at._flat_param = nn.Parameter(torch.zeros(3))
    at._flat_param._fqns = names
    return model


@pytest.mark.parametrize(
    ("path", "names", "expected"),
    [
        (["molora_router", "default"], ["weight", "bias"], RATIO),
        (["molora_router", "other"], ["weight", "bias"], 1.0),
        (["layers"], ["molora_router.default.weight", "molora_threshold.default.bias"], RATIO),
        (["layers"], ["molora_router.other.weight", "molora_A.default.weight"], 1.0),
        (["layers"], ["molora_router.default.weight", "molora_A.default.weight"], None),
    ],
)
def test_vectors_that_fsdp_1_makes_of_parameters_have_the_ratio_of_what_is_in_them(path, names, expected):
    model = flattened(path, names)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    if expected is None:
        with pytest.raises(MoloraError, match="fsdp_use_orig_params"):
            split_groups(optimizer, model, {"default": RATIO})
    else:
        split_groups(optimizer, model, {"default": RATIO})
        assert [group["lr"] for group in optimizer.param_groups if group["params"]] == [expected]
