"""Routers that start from data: what they read, where their rows come from, and who keeps them."""

from __future__ import annotations

import copy
import math

import fast_path
import pytest
import tiny
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file

from molora import ConfigError, MoLoraConfig, MoloraError, record_routing
from molora.calibration import calibrate_routers, features, needs_calibration
from molora.lifecycle import add_experts, drop_experts
from molora.routing.start import (
    evening_offsets,
    half_for_answers,
    kmeans,
    sharpness,
    statistics,
    text_discriminants,
    text_means,
    token_prototypes,
    winning_offset,
)

TOP_2 = {"selection": "top_k", "top_k": 2}
FROM_DATA = {"router_norm": "standardize", "router_init": "clusters", "router_bias": True, **TOP_2}


def batches(rows=12, length=9, seed=1):
    torch.manual_seed(seed)
    ids = torch.randint(4, 94, (rows, length))
    mask = torch.ones_like(ids)
    mask[: rows // 2, : length // 3] = 0
    labels = ids.masked_fill(torch.arange(length) < 2 * length // 3, -100)
    return [
        {"input_ids": i, "attention_mask": m, "labels": t}
        for i, m, t in zip(*(v.split(4) for v in (ids, mask, labels)), strict=True)
    ]


def adapted(calibrated=True, base=None, **fields):
    torch.manual_seed(0)
    config = {
        "r": 2,
        "num_experts": 4,
        "target_modules": fast_path.TARGETS,
        **FROM_DATA,
        **fields,
    }
    config = {name: value for name, value in config.items() if value is not None}
    model = get_peft_model(base or tiny.tiny_llama(), MoLoraConfig(**config))
    if calibrated:
        calibrate_routers(model, batches())
    return model


def routers(model):
    held = {n: m for n, m in model.named_modules() if n.endswith(".molora_router") and len(m)}
    return {name.removesuffix(".molora_router"): modules.default for name, modules in held.items()}


# ---------------------------------------------------------------------------------------------- what a router reads


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


# ------------------------------------------------------------------------------------------------- where rows start


def test_a_calibrated_router_is_even_where_a_drawn_one_is_not():
    loads = {}
    for name, fields in {"drawn": {"router_norm": "none", "router_init": "kaiming_uniform"}, "calibrated": {}}.items():
        model = adapted(calibrated=name == "calibrated", base=_with_common_direction(), **fields)
        with record_routing(model) as records, torch.no_grad():
            for batch in batches():
                model.eval()(**{k: v for k, v in batch.items() if k != "labels"})
        loads[name] = (
            torch.stack([r.routing.selected.float().mean(dim=(0, 1)) / 2 for r in records]).max(dim=1).values.mean()
        )
    assert loads["calibrated"] < 0.36
    assert loads["drawn"] > loads["calibrated"] + 0.05


def _with_common_direction():
    """A model whose hidden states share a direction, as those of trained ones do."""
    model = tiny.tiny_llama()
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(4 * model.get_input_embeddings().weight[5])
    return model


def test_starts_are_the_same_for_the_same_seed_and_others_for_another():
    starts = []
    for seed in (0, 0, 1):
        model = adapted(calibrated=False)
        calibrate_routers(model, batches(), seed=seed)
        starts.append(torch.cat([router.weight.flatten() for router in routers(model).values()]))
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


def test_a_calibration_leaves_experts_mode_and_random_state_alone():
    model = adapted(calibrated=False).train()
    before = {n: v.clone() for n, v in get_peft_model_state_dict(model).items() if "router" not in n}
    data = batches()
    state = torch.get_rng_state()
    calibrate_routers(model, data)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(torch.equal(v, before[n]) for n, v in get_peft_model_state_dict(model).items() if "router" not in n)


def texts(kinds=4, per_kind=8, tokens=20, width=24, noise=1.0, seed=0):
    """Tokens that hold a little of their text's kind, and more of other things."""
    generator = torch.Generator().manual_seed(seed)
    means = 0.8 * torch.randn(kinds, width, generator=generator)
    kind = torch.arange(kinds).repeat_interleave(per_kind)
    row = torch.arange(kinds * per_kind).repeat_interleave(tokens)
    z = means[kind[row]] + noise * torch.randn(len(row), width, generator=generator)
    z[:, :4] *= 4  # large, and about nothing
    answer = torch.arange(tokens).repeat(kinds * per_kind) >= tokens - 3
    mean, std = statistics(z)
    return (z - mean) / std, row, answer, kind[row]


def information(logits, kind, experts):
    joint = torch.zeros(int(kind.max()) + 1, experts).index_put_(
        (kind, logits.argmax(-1)), torch.ones(len(kind)), accumulate=True
    )
    joint = joint / joint.sum()
    ratio = joint / (joint.sum(0, keepdim=True) * joint.sum(1, keepdim=True)).clamp(min=1e-12)
    return float((joint * ratio.clamp(min=1e-12).log2()).sum())


def test_discriminants_tell_kinds_of_text_from_single_tokens_without_labels():
    z, row, answer, _ = texts()
    other, _, _, other_kind = texts(seed=0, per_kind=12)
    rows, offsets = text_discriminants(z, row, answer, torch.ones_like(answer), 4, seed=0)
    drawn = F.normalize(torch.randn(4, z.shape[1], generator=torch.Generator().manual_seed(3)), dim=-1)
    centres, _ = token_prototypes(z, answer, 4, seed=0)
    found = information(other @ rows.T + offsets, other_kind, 4)
    assert found > 1.2
    assert found > information(other @ centres.T, other_kind, 4)
    assert found > information(other @ drawn.T, other_kind, 4) + 0.8


def test_first_tokens_have_no_say_in_discriminants():
    z, row, answer, _ = texts()
    first = torch.cat([row.new_ones(1).bool(), row[1:] != row[:-1]])
    odd = z.masked_fill(first.unsqueeze(-1), 50.0)
    plain = text_discriminants(z, row, answer, ~first, 4, seed=0)
    with_odd = text_discriminants(odd, row, answer, ~first, 4, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(plain, with_odd, strict=True))


def test_the_mean_of_a_text_counts_prompt_and_answer_alike():
    z = torch.tensor([[1.0], [3.0], [10.0], [4.0]])
    means = text_means(z, torch.tensor([7, 7, 7, 9]), torch.tensor([False, False, True, False]))
    assert means.tolist() == [[6.0], [4.0]]


@pytest.mark.parametrize("points", [3, 40, 200])
def test_clusters_are_about_equally_large(points):
    x = torch.randn(points, 6, generator=torch.Generator().manual_seed(0)) + 2
    kind, centres = kmeans(x, None, 4, seed=0, restarts=2)
    assert centres.isfinite().all()
    if points > 4:
        assert torch.bincount(kind, minlength=4).max() <= points / 2


@pytest.mark.parametrize("confidence", [0.3, 0.7, 0.95])
def test_sharpness_meets_the_confidence(confidence):
    logits = torch.randn(500, 4, generator=torch.Generator().manual_seed(0))
    weight = half_for_answers(torch.arange(500) % 7 == 0)
    factor = sharpness(logits, weight, confidence)
    assert torch.softmax(factor * logits, -1).max(-1).values @ weight == pytest.approx(confidence, abs=1e-3)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_offsets_even_loads_out(k):
    logits = torch.randn(3000, 8, generator=torch.Generator().manual_seed(0)) + torch.linspace(-2, 2, 8)
    weight = torch.full((3000,), 1 / 3000)
    loads = lambda values: F.one_hot(values.topk(k).indices, 8).sum((0, 1)) / (3000 * k)  # noqa: E731
    assert loads(logits).max() > 1.5 / 8
    assert loads(logits + evening_offsets(logits, weight, k, seed=0)).max() < 1.15 / 8


def test_answers_get_their_share_of_the_weight():
    weight = half_for_answers(torch.tensor([True, False, False, False]), share=0.25)
    assert weight.tolist() == pytest.approx([0.25, 0.25, 0.25, 0.25])
    for all_alike in (torch.ones(3).bool(), torch.zeros(3).bool()):
        assert half_for_answers(all_alike).tolist() == pytest.approx([1 / 3] * 3)


def test_a_feature_that_never_varies_does_not_decide():
    _, std = statistics(torch.tensor([[1.0, 5.0, 2.0], [2.0, 5.0, 4.0]]))
    assert std.min() > 0
    assert statistics(torch.ones(3, 2))[1].tolist() == [1.0, 1.0]
    mostly_dead = torch.zeros(4, 5)
    mostly_dead[:, 0] = 0.05 * torch.tensor([1.0, -1.0, 1.0, -1.0])
    assert statistics(mostly_dead)[1].tolist() == pytest.approx([0.05, 1, 1, 1, 1])


# ------------------------------------------------------------------------------------------------------ new experts


def test_new_experts_get_the_data_they_are_for_and_old_rows_stay():
    model = adapted()
    old = {n: (r.weight.clone(), r.bias.clone()) for n, r in routers(model).items()}
    add_experts(model, 2)
    new = [
        {**b, "input_ids": torch.randint(4, 12, b["input_ids"].shape, generator=torch.Generator().manual_seed(2))}
        for b in batches()
    ]
    calibrate_routers(model, new, experts=[4, 5])
    for name, router in routers(model).items():
        assert torch.equal(router.weight[:4], old[name][0])
        assert torch.equal(router.bias[:4], old[name][1])
    with record_routing(model) as records, torch.no_grad():
        model.eval()(input_ids=new[-1]["input_ids"])
    share = torch.stack([r.routing.probabilities[..., 4:].sum(-1).mean() for r in records]).mean()
    assert share > 0.7


def test_the_winning_offset_gives_the_share_that_is_wanted():
    generator = torch.Generator().manual_seed(0)
    new, old = torch.randn(300, 2, generator=generator), 3 + torch.randn(300, 5, generator=generator)
    weight = torch.full((300,), 1 / 300)
    shift = winning_offset(new, old, weight, 0.9)
    both = torch.softmax(torch.cat([new + shift, old], -1), -1)[:, :2].sum(-1)
    assert both @ weight == pytest.approx(0.9, abs=1e-3)


# ----------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("experts", "fields", "message"),
    [
        ([4], {}, "indices from 0 to 3"),
        ([0, 0], {}, "different indices"),
        ([], {}, "different indices"),
        ([0, 1, 2, 3], {}, "leave `experts` out"),
        ([3], {"router_bias": False}, "router_bias=True"),
    ],
    ids=str,
)
def test_experts_that_cannot_be_calibrated_are_refused(experts, fields, message):
    with pytest.raises(MoloraError, match=message):
        calibrate_routers(adapted(**fields), batches(), experts=experts)


def test_a_router_is_calibrated_whole_before_it_grows():
    with pytest.raises(MoloraError, match="seen no data"):
        calibrate_routers(adapted(calibrated=False), batches(), experts=[3])


@pytest.mark.parametrize(
    ("fields", "given", "message"),
    [
        ({"router_norm": "none", "router_init": "kaiming_uniform"}, batches(), "router_norm='standardize'"),
        ({}, [], "no calibration batches"),
        (
            {},
            [{"attention_mask": torch.zeros(2, 4, dtype=torch.long), "input_ids": torch.ones(2, 4).long()}],
            "no real token",
        ),
    ],
    ids=["nothing to calibrate", "no batches", "padding only"],
)
def test_calibrations_of_nothing_are_refused(fields, given, message):
    with pytest.raises(MoloraError, match=message):
        calibrate_routers(adapted(calibrated=False, **fields), given)


def test_values_that_are_not_finite_are_named():
    model = adapted(False)
    with torch.no_grad():
        model.get_base_model().get_input_embeddings().weight[50] = torch.nan
    with pytest.raises(MoloraError, match=r"q_proj reads values that are not finite.*eager"):
        calibrate_routers(model, [{"input_ids": torch.full((4, 6), 50)}])


def test_only_an_active_adapter_is_calibrated():
    model = adapted(False)
    model.add_adapter("b", MoLoraConfig(num_experts=4, target_modules=["q_proj"], **FROM_DATA))
    with pytest.raises(MoloraError, match=r"set_adapter\('b'\)"):
        calibrate_routers(model, batches(), "b")
    with model.disable_adapter(), pytest.raises(MoloraError, match="switched off"):
        calibrate_routers(model, batches())
    model.set_adapter("b")
    calibrate_routers(model, batches(), "b")
    assert not needs_calibration(model, "b")


def test_limits_of_thresholds_are_saved_with_what_they_follow_from():
    config = MoLoraConfig(num_experts=4, target_modules=["q_proj"], experts_per_token=2.0)
    assert config.max_threshold == 0.5
    model = adapted(False, selection="adaptive_threshold", top_k=None, experts_per_token=2.0)
    drop_experts(model, [0, 1])
    assert model.peft_config["default"].experts_per_token is None
    assert model.peft_config["default"].max_threshold == 0.5


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"router_norm": "none"}, "router_init"),
        ({"router": "mlp"}, "router_norm"),
        ({"router_norm": "whiten"}, "router_norm"),
        ({"router_confidence": 0.2}, "router_confidence"),
        ({"router_confidence": 1.5}, "router_confidence"),
        ({"router_norm": "none", "router_init": "normal", "router_confidence": 0.7}, "router_confidence"),
        ({"router_norm": "none", "router_init": "normal", "calibration_rows": 5}, "calibration_rows"),
        ({"calibration_rows": 0}, "calibration_rows"),
        ({"router_input": "base"}, "router_norm"),
        ({"router_sharing": "weights"}, "router_norm"),
        ({"threshold_start": 0.5}, "threshold_start"),
        ({"experts_per_token": 2.0}, "experts_per_token"),
        ({"selection": "adaptive_threshold", "top_k": None, "experts_per_token": 4.0}, "experts_per_token"),
        (
            {"selection": "adaptive_threshold", "top_k": None, "experts_per_token": 2.0, "max_threshold": 0.3},
            "max_threshold",
        ),
        ({"router_lr_ratio": 0}, "router_lr_ratio"),
        ({"freeze_router": True, "router_lr_ratio": 2.0}, "router_lr_ratio"),
        ({"selection": "adaptive_threshold", "top_k": None, "threshold_start": 1.0}, "threshold_start"),
    ],
    ids=str,
)
def test_impossible_starts_are_config_errors(fields, field):
    with pytest.raises(ConfigError) as caught:
        MoLoraConfig(**{"num_experts": 4, "target_modules": ["q_proj"], **FROM_DATA, **fields})
    assert field in {problem.field for problem in caught.value.problems}


def test_orthogonal_experts_read_different_things():
    model = adapted(calibrated=False, init_A="orthogonal", target_modules=["down_proj"])
    down = next(m for n, m in model.named_modules() if n.endswith("down_proj")).molora_A.default.weight.detach()
    gram = down @ down.T
    assert (gram - torch.diag(gram.diagonal())).abs().max() < 1e-5
    assert float(gram.diagonal().sqrt().mean()) == pytest.approx(
        1 / math.sqrt(3), rel=1e-4
    )  # as kaiming_uniform's rows
