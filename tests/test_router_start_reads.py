"""Routers that start from data: what they read, from which tokens it is measured, and who keeps it."""

from __future__ import annotations

import copy

import fast_path
import pytest
import tiny
import torch
import torch.nn.functional as F
from calibrated import FROM_DATA, adapted, batches, routers
from methods import MOE_MODELS
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from molora import MoLoraConfig, MoloraError, record_routing
from molora.calibration import calibrate_routers, features, needs_calibration
from molora.lifecycle import add_experts, drop_experts


@pytest.mark.parametrize("norm", ["center", "standardize"])
def test_a_router_reads_what_the_papers_formula_says(norm):
    model = adapted(router_norm=norm, router_init="kaiming_uniform", target_modules=["down_proj"])
    seen = {}
    module = next(m for n, m in model.named_modules() if n.endswith("down_proj"))
    module.register_forward_pre_hook(lambda module, args: seen.update(x=args[0]))
    with record_routing(model) as records, torch.no_grad():
        model(input_ids=fast_path.IDS)
    router, logits = module.molora_router.default, records[0].routing.logits
    x = seen["x"].double()
    z = x - router.input_mean.double()
    z = z / router.input_std.double() if norm == "standardize" else z
    expected = z @ router.weight.double().T + router.bias.double()
    torch.testing.assert_close(logits.double(), expected.view_as(logits), rtol=1e-4, atol=1e-5)


def test_statistics_are_those_of_the_real_tokens_whatever_their_batches():
    one, other = adapted(False, router_init="kaiming_uniform"), adapted(False, router_init="kaiming_uniform")
    calibrate_routers(one, batches())
    shorter = [
        {k: v[i : i + 1, 3 if i < 6 else 0 :] for k, v in b.items()} for b in _whole(batches()) for i in range(12)
    ]
    calibrate_routers(other, shorter)
    for name, router in routers(one).items():
        assert router.input_std.min() > 0
        torch.testing.assert_close(router.input_mean, routers(other)[name].input_mean, rtol=1e-4, atol=1e-5)


def _whole(parts):
    return [{name: torch.cat([part[name] for part in parts]) for name in parts[0]}]


def test_training_before_data_was_seen_is_refused_and_evaluation_is_not():
    model = adapted(calibrated=False)
    assert needs_calibration(model)
    with torch.no_grad():
        model.eval()(input_ids=fast_path.IDS)
    with pytest.raises(MoloraError, match="calibrate_routers"):
        model.train()(input_ids=fast_path.IDS)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"selection": "adaptive_threshold", "top_k": None},
        {"router_sharing": "input"},
        {"router_level": "sequence"},
        {"router_init": "prototypes", "router_confidence": 0.6},
        {"expert_scope": "ffn", "expert_layout": "separate"},
    ],
    ids=str,
)
def test_what_was_calibrated_survives_saving_copying_and_16_bits(fields, tmp_path):
    fields = {name: value for name, value in fields.items() if value is not None}
    base = {k: v for k, v in FROM_DATA.items() if not (k == "top_k" and "selection" in fields)}
    torch.manual_seed(0)
    config = MoLoraConfig(
        **{"r": 2, "num_experts": 4, "target_modules": fast_path.TARGETS, "init_weights": False, **base, **fields}
    )
    model = get_peft_model(tiny.tiny_llama(), config)
    calibrate_routers(model, batches())
    model.eval()
    want = model(input_ids=fast_path.IDS).logits
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert any("input_mean" in name for name in saved)
    loaded = PeftModel.from_pretrained(tiny.tiny_llama(), tmp_path, is_trainable=True)
    assert not needs_calibration(loaded)
    loaded.train()(input_ids=fast_path.IDS)
    assert torch.equal(loaded.eval()(input_ids=fast_path.IDS).logits, want)
    assert torch.equal(copy.deepcopy(model)(input_ids=fast_path.IDS).logits, want)
    assert copy.deepcopy(model).double().float()(input_ids=fast_path.IDS).logits.dtype == torch.float32
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert half(input_ids=fast_path.IDS).logits.isfinite().all()
    assert {r.input_mean.dtype for r in routers(half).values()} == {torch.float32}


def test_growing_and_shrinking_keep_the_statistics():
    model = adapted()
    before = {name: router.input_std.clone() for name, router in routers(model).items()}
    add_experts(model, 2)
    drop_experts(model, [0])
    for name, router in routers(model).items():
        assert torch.equal(router.input_std, before[name])
        assert not router.awaits_data


def test_limits_of_thresholds_are_saved_with_what_they_follow_from():
    config = MoLoraConfig(num_experts=4, target_modules=["q_proj"], experts_per_token=2.0)
    assert config.max_threshold == 0.5
    model = adapted(False, selection="adaptive_threshold", top_k=None, experts_per_token=2.0)
    drop_experts(model, [0, 1])
    assert model.peft_config["default"].experts_per_token is None
    assert model.peft_config["default"].max_threshold == 0.5


def test_memory_and_tokens_are_bounded_and_change_little(monkeypatch):
    whole, bounded = adapted(False), adapted(False)
    calibrate_routers(whole, batches(rows=40))
    passes = []
    run = features.run_batch
    monkeypatch.setattr(features, "run_batch", lambda *args, **options: (passes.append(1), run(*args, **options)))
    monkeypatch.setattr(features, "MAX_MEMORY", 4 * 200 * 40)
    monkeypatch.setattr(features, "MAX_TOKENS", 200)
    calibrate_routers(bounded, batches(rows=40))
    assert len(passes) > 2 * len(batches(rows=40))  # several groups of modules, each its own passes
    for name, router in routers(whole).items():
        similar = F.cosine_similarity(router.input_std, routers(bounded)[name].input_std, dim=0)
        assert 0.95 < similar < 1


def test_padding_of_a_decoder_is_not_counted():
    found = []
    for extra in (0, 5):
        torch.manual_seed(0)
        config = MoLoraConfig(
            num_experts=4,
            target_modules=["q", "wo"],
            task_type="SEQ_2_SEQ_LM",
            **{**FROM_DATA, "router_init": "orthogonal"},
        )
        model = get_peft_model(tiny.tiny_t5(), config)
        ids = torch.randint(4, 94, (4, 9), generator=torch.Generator().manual_seed(0))
        labels = F.pad(ids[:, :6], (0, extra), value=-100)
        calibrate_routers(model, [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}])
        found.append(torch.cat([router.input_mean for router in routers(model).values()]))
    torch.testing.assert_close(found[0], found[1])


def test_texts_that_are_packed_into_a_row_are_told_apart():
    ids = torch.randint(4, 94, (1, 40), generator=torch.Generator().manual_seed(0))
    packed = {"input_ids": ids, "position_ids": torch.arange(40).remainder(5).unsqueeze(0)}
    model = adapted(False)
    calibrate_routers(model, [packed])
    rows = next(iter(routers(model).values())).weight
    assert torch.cdist(rows, rows).fill_diagonal_(1).min() > 1e-3
    del packed["position_ids"]
    with pytest.raises(MoloraError, match="1 texts, and 4 experts"):
        calibrate_routers(adapted(False), [packed])


def _features(model, given):
    readers = [
        module for _, module in sorted(model.named_modules()) if "default" in getattr(module, "molora_router", ())
    ]
    found = features.collect_features(model, readers, "default", given, 0, progress=False)
    return {reader.module_key: part for part, group in found for reader in group}


def test_siblings_keep_their_input_once():
    for dtype in (torch.float32, torch.bfloat16):
        found = _features(adapted(False, base=tiny.tiny_llama().to(dtype)), batches())
        real = sum(int(batch["attention_mask"].sum()) for batch in batches())
        assert {len(part.x) for part in found.values()} == {real}


def test_a_block_that_puts_all_rows_into_one_reads_the_same_tokens():
    torch.manual_seed(0)
    config = MoLoraConfig(num_experts=4, target_modules="all-linear", **FROM_DATA)
    model = get_peft_model(MOE_MODELS["qwen2-moe"]().eval(), config)
    found = _features(model, batches())
    flat = [part for name, part in found.items() if "shared_expert" in name]
    assert flat
    for part in found.values():
        assert torch.equal(part.row.unique(), torch.arange(12))
        assert torch.equal(part.answer.sum(), flat[0].answer.sum())
        assert int(part.first.sum()) == 12
        assert torch.equal(part.row, flat[0].row)


def test_a_pooled_vector_is_a_text_of_its_own():
    torch.manual_seed(0)
    config = MoLoraConfig(num_experts=6, target_modules="all-linear", task_type="SEQ_CLS", **FROM_DATA)
    model = get_peft_model(tiny.tiny_bert_classifier(), config)
    given = [{name: value for name, value in batch.items() if name != "labels"} for batch in batches()]
    (pooled,) = [part for name, part in _features(model, given).items() if "pooler" in name]
    assert torch.equal(pooled.row, torch.arange(12))
    assert pooled.answer.all()
    assert not pooled.first.any()
    calibrate_routers(model, given)


def test_a_contrastive_loss_compares_rows_with_what_the_router_reads():
    model = adapted(target_modules=["down_proj"], router_init="kaiming_uniform")
    module = next(m for n, m in model.named_modules() if n.endswith("down_proj"))
    seen = {}
    module.register_forward_pre_hook(lambda module, args: seen.update(x=args[0]))
    with record_routing(model, needs={"default": frozenset({"token_sums"})}) as records:
        model(input_ids=fast_path.IDS)
    router, record = module.molora_router.default, records[0]
    z = (seen["x"] - router.input_mean) / router.input_std
    expected = torch.einsum("bse,bsi->ei", record.routing.selected.float(), z)
    torch.testing.assert_close(record.parts.token_sums, expected, rtol=1e-3, atol=1e-3)
