"""Routers that start from data: where their rows come from, and those of new experts."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
import torch.nn.functional as F
from calibrated import adapted, batches, routers
from peft import get_peft_model_state_dict

from molora import record_routing
from molora.calibration import calibrate_routers
from molora.lifecycle import add_experts
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


def test_orthogonal_experts_read_different_things():
    model = adapted(calibrated=False, init_A="orthogonal", target_modules=["down_proj"])
    down = next(m for n, m in model.named_modules() if n.endswith("down_proj")).molora_A.default.weight.detach()
    gram = down @ down.T
    assert (gram - torch.diag(gram.diagonal())).abs().max() < 1e-5
    assert float(gram.diagonal().sqrt().mean()) == pytest.approx(
        1 / math.sqrt(3), rel=1e-4
    )  # as kaiming_uniform's rows


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
