"""Losses that a configuration leaves without meaning are refused, and the refusal says what to set."""

from __future__ import annotations

import pytest

from molora import MoLoraConfig
from molora.config_losses import view_dropout
from molora.errors import ConfigError
from molora.losses import LOSSES, coefficient_at, is_scheduled, loss_needs

TOP_2 = {"selection": "top_k", "top_k": 2}


def refused(**fields) -> str:
    with pytest.raises(ConfigError) as error:
        MoLoraConfig(target_modules=["q_proj"], **fields)
    assert any(problem.field == "routing_losses" for problem in error.value.problems)
    return str(error.value)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"load": 0.01, **TOP_2}, "router_noise above 0"),
        ({"load": 0.01, "router_noise": 0.1}, "selection='top_k'"),
        ({"l1_sparsity": 1e-8}, "gate='relu', not 'softmax'"),
        ({"l1_sparsity": 0.0, "gate": "relu", "selection": "dense"}, "never leaves 0"),
        ({"l1_sparsity": 1e-8, "gate": "relu", "selection": "dense", "num_experts": 2}, "below num_experts, 2"),
        ({"l1_sparsity": 1e-8, "gate": "relu", "selection": "threshold", "null_experts": 1}, "null_experts=0"),
        ({"router_z": 0.1, "logit_norm": 1.0}, "bounded already"),
        ({"routing_contrastive": 0.1, "router": "mlp"}, "set router='linear' or 'arrow'"),
        ({"routing_contrastive": 0.1, "router": "cosine", "router_dim": 8}, "without router_dim"),
        ({"routing_contrastive": 0.1, **TOP_2, "router_level": "sequence"}, "router_level='token'"),
        ({"router_orthogonality": 0.1, **TOP_2, "router": "activation_norm"}, "has none"),
        ({"expert_contrastive": 0.1, "selection": "dense"}, "none is left out"),
        ({"expert_contrastive": 0.1, "selection": "top_k", "top_k": 1, "renormalize": False}, "set 2 or more"),
        ({"expert_contrastive": 0.1, **TOP_2, "expert_layout": "factors"}, "matrices of their own"),
        ({"expert_orthogonality": 0.1, **TOP_2, "expert_layout": "shared_A"}, "expert_layout='separate'"),
        ({"gate_contrastive": 0.1, **TOP_2, "router_sharing": "block"}, "positives: task"),
        ({"gate_contrastive": 0.1, **TOP_2, "router": "activation_norm"}, "second view of the input"),
        ({"consistency": 1.0, **TOP_2}, "set expert_dropout"),
        ({"load_balancing": {"coefficient": 0.1, "scope": "global", "count": "first"}, **TOP_2}, "set another scope"),
        ({"load_balancing": {"coefficient": {"start": 0, "end": 1}, "adaptive": True}, **TOP_2}, "a controller moves"),
        ({"load_balancing": {"coefficient": 0.1, "adaptive": {"decai": 1}}, **TOP_2}, "Did you mean 'decay'"),
        ({"load_balancing": {"coefficient": 0.1, "adaptive": {"decay": 2}}, **TOP_2}, "from 0 to 1"),
        ({"load_balancing": {"coefficient": 0.1, "adaptive": 3}, **TOP_2}, "must be true"),
        ({"load_balancing": {"scope": "batch"}, **TOP_2}, "mapping with `coefficient`"),
        ({"load_balancing": {"coefficient": {"start": 0}}, **TOP_2}, "coefficient.end: is missing"),
        ({"load_balancing": {"coefficient": {"start": -1, "end": 0}}, **TOP_2}, "at least 0"),
        ({"load_balanzing": 0.1}, "Did you mean 'load_balancing'"),
        ({"l1_sparsity": 1e-8, "gate": "relu", **TOP_2, "renormalize": False}, "set selection='dense'"),
        ({"load_balancing": 0.1, "selection": "dense"}, "teaches nothing"),
        ({"load_balancing": 0.1, **TOP_2, "gate": "identity", "renormalize": False}, "any sign"),
        ({"localized_balancing": {"coefficient": 0.1, "groups": 3}, **TOP_2}, "3 equal groups"),
        ({"router_orthogonality": 0.1, **TOP_2, "freeze_router": True}, "freeze_router=True keeps them"),
        ({"expert_orthogonality": 0.1, **TOP_2, "freeze_A": True}, "set target: B"),
        (
            {
                "expert_orthogonality": {"coefficient": 0.1, "target": "output"},
                "selection": "top_k",
                "top_k": 1,
                "renormalize": False,
            },
            "top_k=1 selects one",
        ),
        ({"expert_contrastive": 0.1, **TOP_2, "num_experts": 2}, "none is left out"),
        ({"expert_orthogonality": 0.1, **TOP_2, "router_sharing": "block"}, "only the first"),
        (
            {"expert_orthogonality": {"coefficient": 0.1, "target": "output"}, **TOP_2, "router": "task"},
            "about a whole row",
        ),
        ({"batch_entropy": 0.1, "selection": "dense", "num_experts": 1, "renormalize": False}, "there is one"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_a_loss_without_meaning_is_refused(fields, words):
    fields = {"num_tasks": 2, **fields} if fields.get("router") == "task" else fields
    losses = {name: value for name, value in fields.items() if name in (*LOSSES, "load_balanzing")}
    others = {name: value for name, value in fields.items() if name not in losses}
    assert words in refused(routing_losses=losses, **others)


def test_all_losses_without_meaning_are_named_at_once():
    message = refused(routing_losses={"load": 0.1, "l1_sparsity": 0.1, "consistency": 0.1})
    assert all(name in message for name in ("load:", "l1_sparsity:", "consistency:"))


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ({}, None),
        ({"gate_contrastive": 0.1}, 0.2),
        ({"gate_contrastive": {"coefficient": 0.1, "mask_ratio": 0.3}}, 0.3),
        ({"gate_contrastive": {"coefficient": 0.1, "positives": "task"}}, None),
    ],
)
def test_a_second_view_is_made_only_where_a_loss_compares_views(losses, expected):
    assert view_dropout(MoLoraConfig(target_modules=["q_proj"], routing_losses=losses)) == expected


@pytest.mark.parametrize(
    ("setting", "steps"),
    [
        (0.5, [0.5, 0.5, 0.5]),
        ({"coefficient": 0.5}, [0.5, 0.5, 0.5]),
        ({"coefficient": {"start": 0.0, "end": 1.0}}, [0.0, 0.5, 1.0]),
        ({"coefficient": {"start": 0.0, "end": 1.0, "until": 0.5}}, [0.0, 1.0, 1.0]),
    ],
)
def test_coefficients_are_numbers_or_schedules(setting, steps):
    assert [coefficient_at(setting, step, 3) for step in range(3)] == steps
    assert is_scheduled(setting) == (len(set(steps)) > 1)


def test_layers_are_asked_for_nothing_that_no_loss_reads():
    assert loss_needs("load_balancing", 0.1) == frozenset()
    assert loss_needs("expert_orthogonality", {"coefficient": 1, "target": "B"}) == {"up"}
    assert loss_needs("gate_contrastive", {"coefficient": 1, "positives": "task"}) == {"task_ids"}
    assert loss_needs("routing_contrastive", 1.0) == {"rows", "token_sums"}
