"""Every routing loss in a real training: logged, scaled, checkpointed, and of what the layers really did."""

from __future__ import annotations

import ast
import functools
import itertools
import tempfile

import kinds
import pytest
import tiny
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import Gemma2Config, Gemma2ForCausalLM, TrainingArguments

from molora import MoLoraConfig, MoloraError, record_routing
from molora.data.collate import TaskCollator
from molora.losses import LOSSES, LossInputs, loss_needs, total_loss
from molora.routing.masks import TokenMasks
from molora.routing.record import RoutingRecord
from molora.routing.route import Routing
from molora.routing.stacked import stack_records
from molora.trainers import MoLoraTrainer
from molora.trainers.consistency import ModelOutput, _head, consistency_of

TOP_2 = {"preset": "mole", "selection": "top_k", "top_k": 2, "routing_losses": {}}
RELU = {"preset": "molora", "gate": "relu", "renormalize": False}
NOISY = {**TOP_2, "router_noise": 0.5}
CASES: dict[str, tuple[dict, dict, str]] = {
    # loss: settings of the adapter, options of the loss, a parameter it must move
    "load_balancing": (TOP_2, {"scope": "global"}, "molora_router"),
    "localized_balancing": (TOP_2, {}, "molora_router"),
    "mutual_information": (TOP_2, {}, "molora_router"),
    "parameter_penalty": (TOP_2, {}, "molora_router"),
    "router_entropy": (TOP_2, {}, "molora_router"),
    "batch_entropy": (TOP_2, {}, "molora_router"),
    "importance": (TOP_2, {}, "molora_router"),
    "load": (NOISY, {}, "molora_router"),
    "router_z": (TOP_2, {}, "molora_router"),
    "l1_sparsity": (RELU, {"experts_per_token": 1.5}, "molora_router"),
    "routing_contrastive": (TOP_2, {}, "molora_router"),
    "expert_contrastive": (TOP_2, {"max_tokens": 8}, "molora_B"),
    "gate_contrastive": (TOP_2, {"positives": "view"}, "molora_router"),
    "expert_orthogonality": (TOP_2, {"target": "A"}, "molora_A"),
    "router_orthogonality": (TOP_2, {}, "molora_router"),
    "consistency": (NOISY, {"max_tokens": 8}, "molora_router"),
}
VARIANTS = [
    *((name, *CASES[name]) for name in CASES),
    ("expert_orthogonality", TOP_2, {"target": "B"}, "molora_B"),
    ("expert_orthogonality", TOP_2, {"target": "output"}, "molora_B"),
    ("gate_contrastive", TOP_2, {"positives": "task"}, "molora_router"),
    ("expert_contrastive", {**TOP_2, "expert_layout": "shared_A"}, {}, "molora_B"),
    ("expert_contrastive", {**TOP_2, "shared_experts": 1}, {}, "molora_B"),
    ("routing_contrastive", {**TOP_2, "router": "cosine", "null_experts": 1}, {}, "molora_router"),
    ("load_balancing", TOP_2, {"adaptive": {"maximum": 0.5}}, "molora_router"),
    ("load_balancing", {**TOP_2, "top_k": 1, "renormalize": False}, {"scope": "batch"}, "molora_router"),
]
IDS = [
    f"{name}-{'-'.join(map(str, options.values()))}-{index}" for index, (name, _, options, _) in enumerate(VARIANTS)
]


def test_every_loss_has_a_case():
    assert set(CASES) == set(LOSSES)


def adapted(settings: dict, losses: dict, **overrides):
    torch.manual_seed(0)
    fields = {"num_experts": 4, "target_modules": ["q_proj", "down_proj"], "init_weights": False, **settings}
    return get_peft_model(
        tiny.tiny_llama(), MoLoraConfig.from_preset(fields.pop("preset"), **{**fields, "routing_losses": losses})
    )


def rows() -> Dataset:
    generator = torch.Generator().manual_seed(1)
    examples = []
    for index, length in enumerate((5, 9, 7, 12, 6, 8, 10, 4)):
        ids = torch.randint(5, 90, (length,), generator=generator).tolist()
        examples.append({"input_ids": ids, "labels": [-100, -100, *ids[2:]], "task_ids": index % 2})
    return Dataset.from_list(examples)


def trainer_for(folder, model, **arguments):
    settings = {
        "output_dir": str(folder),
        "max_steps": 1,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "per_device_train_batch_size": 4,
        "seed": 3,
        "max_grad_norm": 0.0,
        **arguments,
    }
    tokenizer = tiny.tiny_tokenizer()
    return MoLoraTrainer(
        model=model,
        args=TrainingArguments(**settings),
        train_dataset=rows(),
        processing_class=tokenizer,
        data_collator=TaskCollator(pad_token_id=tokenizer.pad_token_id),
    )


def first_gradients(folder, model, **arguments):
    trainer = trainer_for(folder, model, **arguments)
    caught = kinds.gradients(trainer)
    logged = next(entry for entry in trainer.state.log_history if "loss" in entry)
    return caught, logged


@functools.cache
def without_losses(settings: str):
    with tempfile.TemporaryDirectory() as folder:
        return first_gradients(folder, adapted(ast.literal_eval(settings), {}))[0]


def setting(options, coefficient):
    return {"coefficient": coefficient, **options}


@pytest.mark.parametrize(("name", "settings", "options", "moves"), VARIANTS, ids=IDS)
def test_a_loss_is_logged_and_moves_what_it_is_about_checkpointed_or_not(name, settings, options, moves, tmp_path):
    # All tokens: recomputation moves the random state from which a sample would be drawn.
    quiet = {**options, "max_tokens": 512} if "max_tokens" in LOSSES[name].options else options
    if name == "consistency":  # its second pass draws other noise, whatever its coefficient
        without, _ = first_gradients(tmp_path, adapted(settings, {name: setting(quiet, 0.0)}))
    else:
        without = without_losses(repr(settings))
    strong, logged = first_gradients(tmp_path, adapted(settings, {name: setting(quiet, 1.0)}))
    assert torch.isfinite(torch.tensor(logged[f"molora/{name}"]))
    moved = [n for n in strong if moves in n and not torch.allclose(strong[n], without[n], rtol=1e-4, atol=1e-9)]
    assert moved
    assert all(torch.isfinite(gradient).all() for gradient in strong.values())
    again = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    recomputed, _ = first_gradients(tmp_path, adapted(settings, {name: setting(quiet, 1.0)}), **again)
    assert strong.keys() == recomputed.keys()
    for parameter in strong:
        torch.testing.assert_close(strong[parameter], recomputed[parameter], rtol=1e-4, atol=1e-6)


def test_losses_of_any_number_combine_in_one_field(tmp_path):
    losses = {name: setting(options, 0.01) for name, (s, options, _) in CASES.items() if s is TOP_2}
    _, logged = first_gradients(tmp_path, adapted(TOP_2, losses))
    assert {f"molora/{name}" for name in losses} <= logged.keys()


def recorded(model, needs, **inputs):
    with record_routing(model, needs={"default": needs}) as records:
        model(**inputs)
    return records


def test_outputs_of_experts_are_those_the_layer_adds():
    """Hidden, B and the map of columns, gated by the decision, give the delta of the layer."""
    model = adapted(TOP_2, {})
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    seen = []
    layer.register_forward_hook(lambda module, args, out: seen.append((args[0], out - module.base_layer(args[0]))))
    ids = torch.randint(5, 90, (2, 6), generator=torch.Generator().manual_seed(0))
    records = recorded(model, frozenset({"columns", "up", "down", "rows", "token_sums"}), input_ids=ids)
    [record] = [r for r in records if r.layer.endswith("layers.0.self_attn.q_proj")]
    [stack] = stack_records([record])
    gate = record.routing.weights[..., record.parts.experts]
    delta = (stack.columns[0] * gate) @ stack.part("up")[0].T
    x, expected = seen[0]
    torch.testing.assert_close(delta, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(x @ stack.part("down")[0].T, record.parts.hidden, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(x @ stack.part("rows")[0].T, record.routing.logits, rtol=1e-4, atol=1e-5)
    sums = torch.einsum("bse,bsd->ed", record.routing.selected.float(), x)
    torch.testing.assert_close(record.parts.token_sums, sums, rtol=1e-4, atol=1e-4)
    assert record.parts.token_counts.tolist() == record.routing.selected.sum(dim=(0, 1)).tolist()
    assert not record.parts.token_sums.requires_grad


def test_padding_is_no_part_of_the_tokens_of_an_expert():
    model = adapted(TOP_2, {})
    ids = torch.randint(5, 90, (1, 6), generator=torch.Generator().manual_seed(0))
    padded = torch.cat([ids, torch.zeros(1, 3, dtype=torch.long)], dim=1)
    mask = (torch.arange(9) < 6).long().unsqueeze(0)
    needs = frozenset({"token_sums"})
    plain = recorded(model, needs, input_ids=ids)
    with_padding = recorded(model, needs, input_ids=padded, attention_mask=mask)
    for a, b in zip(plain, with_padding, strict=True):
        torch.testing.assert_close(a.parts.token_sums, b.parts.token_sums, rtol=1e-4, atol=1e-4)
        assert a.parts.token_counts.tolist() == b.parts.token_counts.tolist()


def test_nothing_more_than_decisions_is_kept_unless_a_loss_asks():
    model = adapted(TOP_2, {})
    with record_routing(model) as records:
        model(input_ids=torch.tensor([[5, 6, 7]]))
    assert records
    assert all(record.parts is None for record in records)


def test_packed_examples_are_judged_one_by_one():
    """Two examples in one row give the losses of the two rows they came from."""
    model = adapted(TOP_2, {}).double()
    losses = {"load_balancing": 1.0, "mutual_information": 1.0, "localized_balancing": 1.0, "router_z": 1.0}
    generator = torch.Generator().manual_seed(0)
    first, second = (
        torch.randint(5, 90, (1, 4), generator=generator),
        torch.randint(5, 90, (1, 7), generator=generator),
    )
    tasks = LossInputs(task_ids=torch.tensor([0, 1]))
    mask = torch.tensor([[1] * 4 + [0] * 3, [1] * 7])
    apart = torch.cat([torch.nn.functional.pad(first, (0, 3)), second])
    with record_routing(model) as records:
        model(input_ids=apart, attention_mask=mask)
    expected, _ = total_loss(stack_records(records), losses, tasks)
    rows_of_tokens = torch.tensor([[0, 1, 2, 3, -1, -1, -1], [4, 5, 6, 7, 8, 9, 10]])
    with record_routing(model, packed_rows=rows_of_tokens) as records:
        positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6]])
        # An attention that keeps the examples apart, which on a GPU the packed kernel sees to.
        blocks = torch.block_diag(torch.ones(4, 4).tril(), torch.ones(7, 7).tril()).bool()[None, None]
        model(input_ids=torch.cat([first, second], dim=1), position_ids=positions, attention_mask=blocks)
    packed, _ = total_loss(stack_records(records), losses, tasks)
    torch.testing.assert_close(packed, expected)


def test_several_decisions_of_a_token_stay_with_their_packed_example():
    """Polytropon's multi-head form decides for each part of the features."""
    of_tokens = torch.arange(10.0).reshape(1, 10, 1).expand(1, 10, 3)  # five tokens with two decisions each
    routing = Routing(of_tokens, of_tokens, of_tokens > 0, of_tokens)
    packed = torch.tensor([[0, 1, -1], [2, 3, 4]])
    record = RoutingRecord("a", "x", routing, TokenMasks(), vectors=2, packed_rows=packed)
    [stack] = stack_records([record])
    assert stack.probabilities[0, 1, :, 0].tolist() == [4, 5, 6, 7, 8, 9]
    assert stack.probabilities[0, 0, :4, 0].tolist() == [0, 1, 2, 3]
    assert stack.mask.int().tolist() == [[1, 1, 1, 1, 0, 0], [1] * 6]
    padded = RoutingRecord("a", "x", routing, TokenMasks(torch.tensor([[1, 1, 1, 0, 0]])), vectors=2)
    assert padded.mask.int().tolist() == [[1] * 6 + [0] * 4]


@pytest.mark.parametrize("coefficient", [{"start": 0.0, "end": 1.0, "until": 1.0}, {"start": 0.5, "end": 0.1}])
def test_a_coefficient_may_follow_a_schedule_and_is_logged(coefficient, tmp_path):
    losses = {"router_z": {"coefficient": coefficient}}
    trainer = trainer_for(tmp_path, adapted(TOP_2, losses), max_steps=3)
    trainer.train()
    logged = [e["molora/router_z_coefficient"] for e in trainer.state.log_history if "loss" in e]
    start, end = coefficient["start"], coefficient["end"]
    assert logged == pytest.approx([start, (start + end) / 2, end])


def test_a_warm_up_from_zero_leaves_the_first_step_alone(tmp_path):
    def first(losses):
        gradients, _ = first_gradients(tmp_path, adapted(TOP_2, losses), max_steps=1, num_train_epochs=1)
        return gradients

    warm = {"router_z": {"coefficient": {"start": 0.0, "end": 100.0}}}
    trainer = trainer_for(tmp_path, adapted(TOP_2, warm), max_steps=2)
    steps = []
    trainer.create_optimizer_and_scheduler(2)

    def keep(*_):
        steps.append({name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.requires_grad})

    trainer.optimizer.register_step_pre_hook(keep)
    trainer.train()
    for parameter, gradient in first({"router_z": 0.0}).items():
        torch.testing.assert_close(steps[0][parameter], gradient, rtol=1e-5, atol=1e-8)
    router = next(name for name in steps[1] if "molora_router" in name)
    assert steps[1][router].norm() > 10 * steps[0][router].norm()


def test_a_relu_mixture_becomes_as_sparse_as_asked(tmp_path):
    losses = {"l1_sparsity": {"coefficient": 1e-2, "experts_per_token": 1.0, "alpha": 1.5}}
    arguments = {"max_steps": 30, "learning_rate": 2e-2, "max_grad_norm": 1.0}
    trainer = trainer_for(tmp_path, adapted(RELU, losses), **arguments)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    active = [entry["molora/experts_per_token"] for entry in logged]
    assert active[0] > 1.7
    assert min(active) < 1.2
    coefficients = [entry["molora/l1_sparsity_coefficient"] for entry in logged]
    grows = [after > before for before, after in itertools.pairwise(coefficients)]
    assert grows == [before > 1.0 for before in active[: len(grows)]], "follows what the step before used"


def logged_with(folder, settings, losses, **arguments):
    return first_gradients(folder, adapted(settings, losses), **arguments)[1]


@pytest.mark.parametrize(
    "options", [{"scope": "global"}, {"scope": "batch"}, {"scope": "batch", "layer_reduction": "sum"}], ids=str
)
def test_a_loss_does_not_grow_with_the_forward_passes_of_a_step(options, tmp_path):
    """Consistency makes a second one; preference trainers may make several."""
    quiet = {**NOISY, "router_noise": 1e-9}
    once = logged_with(tmp_path, quiet, {"load_balancing": {"coefficient": 0.1, **options}})
    twice = logged_with(tmp_path, quiet, {"load_balancing": {"coefficient": 0.1, **options}, "consistency": 0.0})
    assert twice["molora/load_balancing"] == pytest.approx(once["molora/load_balancing"], rel=1e-4)
    assert twice["loss"] == pytest.approx(once["loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("name", "settings", "options", "moves"),
    [variant for variant in VARIANTS if variant[0] != "consistency"],
    ids=[name for name in IDS if not name.startswith("consistency")],
)
def test_a_loss_reaches_every_adapted_linear(name, settings, options, moves, tmp_path):
    quiet = {**options, "max_tokens": 512} if "max_tokens" in LOSSES[name].options else options
    model = adapted(settings, {name: setting(quiet, 1.0)})
    with record_routing(model, needs={"default": frozenset(loss_needs(name, options))}) as records:
        batch = TaskCollator(pad_token_id=0)([dict(row) for row in rows().select(range(4))])
        tasks = batch.pop("task_ids")
        model.train()
        model(**batch)
    losses = model.peft_config["default"].routing_losses
    total, _ = total_loss(stack_records(records), losses, LossInputs(task_ids=tasks, noise=0.5))
    total.backward()
    reached = {n.rsplit(".molora_", 1)[0] for n, p in model.named_parameters() if moves in n and p.grad is not None}
    assert len(reached) == 4
    parts = [p.grad for n, p in model.named_parameters() if moves in n and p.grad is not None]
    assert all(gradient.abs().max() > 0 for gradient in parts)


def test_consistency_through_a_fused_head_sees_the_models_own_predictions():
    """TRL's heads never give logits; what is computed in their place is scaled and capped as the model does."""
    for model in (tiny.tiny_llama(), tiny_gemma()):
        hidden = {}
        model.base_model.register_forward_hook(lambda module, args, out, h=hidden: h.update(x=out.last_hidden_state))
        logits = model(input_ids=torch.tensor([[5, 6, 7]])).logits
        torch.testing.assert_close(_head(model, hidden["x"]), logits)


def tiny_gemma():
    fields = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Gemma2Config(vocab_size=100, num_key_value_heads=2, head_dim=8, final_logit_softcapping=0.05, **fields)
    return Gemma2ForCausalLM(config).eval()


def test_a_model_that_gives_one_number_has_no_predictions_to_compare():
    output = ModelOutput(torch.zeros(2, 1), None, None)
    with pytest.raises(MoloraError, match="a single number"):
        consistency_of([output], [output], 8)


def test_consistency_counts_the_task_once_on_average(tmp_path):
    """Without randomness both passes agree: the loss is the task's, and nothing is added."""
    model = adapted({**NOISY, "router_noise": 1e-9}, {"consistency": 1.0})
    plain = adapted({**NOISY, "router_noise": 1e-9}, {})
    _, logged = first_gradients(tmp_path, model)
    _, expected = first_gradients(tmp_path, plain)
    assert logged["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    assert logged["molora/consistency"] == pytest.approx(0, abs=1e-5)
