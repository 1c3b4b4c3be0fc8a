"""The references themselves: cases whose answer is known without them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from references import REFERENCES

B, S, D = 3, 4, 8
TASK_ROUTED = {"moelora", "mocle"}
AFTER = {"becotta", "smear"}
FFN = {"mixlora", "mixlora-dynamic"}
SUM_TO_ONE = [
    "mole", "loramoe", "mola", "sira", "molora", "hydralora", "adamoe", "pmoe", "smora", "hmoe", "moelora", "mocle",
    "polytropon", "polytropon-mhr", "static", "x-lora", "arrow", "phatgoose", "glider", "lora-bank", "selma",
    "adamole", "recommended",
]  # fmt: skip
RAW = ["perft", "aoe", "self-moe", "mora-cl"]  # probabilities as they are: one expert alone has all of it


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def router_state(name, count, width):
    """What the method's router holds."""
    if name in TASK_ROUTED:
        return {"molora_router.embedding": normal(5, 6), "molora_router.weight": normal(count, 6)}
    if name in ("static", "lorahub", "psec"):
        return {"molora_router.weight": normal(count)}
    if name in ("polytropon", "polytropon-mhr"):
        return {"molora_router.weight": normal(5, count * (2 if name.endswith("mhr") else 1))}
    if name == "becotta":
        return {"molora_router.weight": normal(5, count, width)}
    if name == "x-lora":
        shapes = {"weight_in": (6, 7), "bias_in": (6,), "weight": (count, 6), "bias": (count,)}
        return {f"molora_router.{key}": normal(*shape) for key, shape in shapes.items()}
    state = {"molora_router.weight": normal(count, width)}
    if name == "recommended":
        statistics = {"bias": normal(count), "input_mean": normal(width), "input_std": normal(width).abs() + 0.1}
        state |= {f"molora_router.{key}": value for key, value in statistics.items()}
    if name == "smear":
        state |= {"molora_router.bias": normal(count)}
        state |= {f"molora_router.{key}": normal(width) for key in ("input_scale", "weight_scale")}
    return state


def case(name, experts=3, rank=2, seed=0, **settings):
    """State, x, base, settings and inputs of one method."""
    torch.manual_seed(seed)
    out = D if name in AFTER else 6
    if name in ("smora", "flylora", "mor1e", "mora-cl"):
        rank = 1
    count = experts * 4 if name == "mor1e-pairs" else experts
    ranks = [rank] * count
    hyper = SimpleNamespace(ranks=ranks, scales=[1.5] * count, num_splits=2, r=(experts, 4), training=False)
    total = sum(ranks)
    rows, columns = {"hydralora": (rank, total), "mor1e-pairs": (experts, 4)}.get(name, (total, total))
    state = {"molora_A.weight": normal(rows, D), "molora_B.weight": normal(out, columns)}
    shared = name == "mocle" and experts > 1
    if name == "adamoe":
        hyper.null_experts = settings.get("null_experts", 2)
    routed = count - shared + getattr(hyper, "null_experts", 0)
    state |= router_state(name, routed, D)
    state |= {"molora_threshold.weight": normal(1, D), "molora_threshold.bias": normal(1)}
    state |= {"molora_blend.token": normal(1) / 100, "molora_blend.output": normal(1) / 100}
    if name in ("smora", "flylora", "recommended"):
        state["molora_bias.weight"] = 0.1 * normal(count).abs()
    if name == "smear":
        state["molora_A.bias"] = normal(total)
    weight = normal(out, D)
    base = lambda x: x @ weight.T  # noqa: E731
    if name == "mos":
        state = {"molora_pool.weight_A": normal(9, D // 2), "molora_pool.weight_B": normal(9, out // 2)}
        state |= {f"molora_{side}.index": torch.randint(9, (rank, 2)).double() for side in "AB"}
    if name in FFN:
        state, base = ffn_case(state["molora_router.weight"], total)
    inputs = {"task_ids": torch.tensor([2, 0, 4]), "expert_scores": normal(B, count)}
    inputs["prompt_mask"] = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0]]).bool()
    if name in ("pmoe", "x-lora"):
        inputs["decision"] = normal(B, S, D) if name == "pmoe" else normal(B, 7)
    for key, value in settings.items():
        setattr(hyper, key, value)
    return state, normal(B, S, D), base, hyper, inputs


def ffn_case(router, total):
    """A gated block `8 -> 10 -> 8` and its LoRAs."""
    state, linears = {"gate_proj.molora_router.weight": router}, {}
    for name, width, out in (("gate", D, 10), ("up", D, 10), ("down", 10, D)):
        state[f"{name}_proj.molora_A.weight"] = normal(total, width)
        state[f"{name}_proj.molora_B.weight"] = normal(out, total)
        linears[name] = (lambda weight: lambda x: x @ weight.T)(normal(out, width))
    return state, SimpleNamespace(**linears, act=torch.nn.functional.silu)


def plain_lora(state, x, base, scale, rank, prefix=""):
    """`W0 x + s B_0 A_0 x` with the first expert, all tokens at once."""
    return (
        base(x)
        + scale * x @ state[f"{prefix}molora_A.weight"][:rank].T @ state[f"{prefix}molora_B.weight"][:, :rank].T
    )


def equal_experts(state, hyper, prefix=""):
    """Every expert a copy of the first."""
    rank, count = hyper.ranks[0], len(hyper.ranks)
    for name, dim in (("A", 0), ("B", 1)):
        weight = state[f"{prefix}molora_{name}.weight"]
        if weight.shape[dim] == rank * count:
            repeats = (count, 1) if dim == 0 else (1, count)
            state[f"{prefix}molora_{name}.weight"] = weight.narrow(dim, 0, rank).repeat(*repeats)


@pytest.mark.parametrize("name", REFERENCES)
def test_output_is_fp64_and_does_not_depend_on_other_rows(name):
    state, x, base, hyper, inputs = case(name, max_threshold=0.2)
    output = REFERENCES[name](state, x, base, hyper, inputs)
    assert output.dtype == torch.float64
    assert output.isfinite().all()
    assert output.shape[:2] == x.shape[:2]
    for b in range(B):
        row = {key: value[b : b + 1] for key, value in inputs.items()}
        torch.testing.assert_close(REFERENCES[name](state, x[b : b + 1], base, hyper, row), output[b : b + 1])


@pytest.mark.parametrize("name", REFERENCES)
def test_zero_b_gives_the_base_output(name):
    state, x, base, hyper, inputs = case(name, top_p=1.0)
    for key in state:
        if key.endswith(("molora_B.weight", "weight_B")):
            state[key] = torch.zeros_like(state[key])
    expected = base.down(base.act(base.gate(x)) * base.up(x)) if name in FFN else base(x)
    torch.testing.assert_close(REFERENCES[name](state, x, base, hyper, inputs), expected)


@pytest.mark.parametrize("name", sorted({*SUM_TO_ONE, *RAW, "lora"} - {"mocle"}))
def test_one_expert_is_plain_lora(name):
    state, x, base, hyper, inputs = case(name, experts=1, null_experts=0)
    expected = plain_lora(state, x, base, 1.5, hyper.ranks[0])
    torch.testing.assert_close(REFERENCES[name](state, x, base, hyper, inputs), expected)


@pytest.mark.parametrize("name", SUM_TO_ONE)
def test_weights_sum_to_one(name):
    """Then copies of one expert mix to that expert."""
    settings = {"null_experts": 0} if name == "adamoe" else {"top_k": 2, "temperature": 0.7}
    state, x, base, hyper, inputs = case(name, **settings)
    equal_experts(state, hyper)
    expected = plain_lora(state, x, base, 1.5, hyper.ranks[0])
    torch.testing.assert_close(REFERENCES[name](state, x, base, hyper, inputs), expected)


@pytest.mark.parametrize("name", RAW)
def test_raw_probabilities_sum_to_less_than_one(name):
    state, x, base, hyper, inputs = case(name, top_k=2)
    equal_experts(state, hyper)
    change = REFERENCES[name](state, x, base, hyper, inputs) - base(x)
    share = change / (plain_lora(state, x, base, 1.5, hyper.ranks[0]) - base(x))
    assert ((share > 0.5) & (share < 1)).all()
    torch.testing.assert_close(share, share[..., :1].expand_as(share))


@pytest.mark.parametrize("name", sorted(FFN))
def test_mixlora_of_equal_experts(name):
    """The block with one LoRA, times the sum of the weights: 1 for top-k, at least p for top-p."""
    state, x, base, hyper, inputs = case(name, top_k=2, top_p=0.5)
    for prefix in ("gate_proj.", "up_proj.", "down_proj."):
        equal_experts(state, hyper, prefix)
    gate = plain_lora(state, x, base.gate, 1.5, 2, "gate_proj.")
    hidden = base.act(gate) * plain_lora(state, x, base.up, 1.5, 2, "up_proj.")
    share = REFERENCES[name](state, x, base, hyper, inputs) / plain_lora(
        state, hidden, base.down, 1.5, 2, "down_proj."
    )
    torch.testing.assert_close(share, share[..., :1].expand_as(share))
    if name == "mixlora":
        torch.testing.assert_close(share, torch.ones_like(share))
    else:
        assert ((share >= 0.5 - 1e-9) & (share <= 1 + 1e-9)).all()


def test_empty_selection_gives_the_base_output():
    state, x, base, hyper, inputs = case("adamole", max_threshold=1.0)
    state["molora_threshold.bias"] += 50
    torch.testing.assert_close(REFERENCES["adamole"](state, x, base, hyper, inputs), base(x))
    state, x, base, hyper, inputs = case("mora-cl", min_logit=2.0)
    torch.testing.assert_close(REFERENCES["mora-cl"](state, x, base, hyper, inputs), base(x))
    state, x, base, hyper, inputs = case("adamoe", top_k=2)
    state["molora_router.weight"][:3] = 0
    state["molora_router.weight"][3:] = 1
    x = x.abs()
    torch.testing.assert_close(REFERENCES["adamoe"](state, x, base, hyper, inputs), base(x))


def test_the_last_two_experts_of_recommended_are_shared():
    state, x, base, hyper, inputs = case("recommended")
    hyper.ranks, hyper.scales = [2] * 5, [1.5] * 5
    wider = {**state, "molora_A.weight": normal(10, D), "molora_B.weight": normal(6, 10)}
    routed = {
        **wider,
        "molora_A.weight": wider["molora_A.weight"][:6],
        "molora_B.weight": wider["molora_B.weight"][:, :6],
    }
    found = REFERENCES["recommended"](wider, x, base, hyper, inputs)
    shared = 1.5 * x @ wider["molora_A.weight"][6:].T @ wider["molora_B.weight"][:, 6:].T
    hyper.ranks, hyper.scales = [2] * 3, [1.5] * 3
    torch.testing.assert_close(found, REFERENCES["recommended"](routed, x, base, hyper, inputs) + shared)


def test_mocle_weighs_the_universal_expert_with_the_rest():
    state, x, base, hyper, inputs = case("mocle", temperature=None)
    tasks = state["molora_router.embedding"][inputs["task_ids"]]
    shares = torch.softmax(tasks @ state["molora_router.weight"].T / 0.05, dim=-1)
    shares = torch.where(shares == shares.max(-1, keepdim=True).values, shares, 0.0)
    weights = torch.cat([shares, 1 - shares.sum(-1, keepdim=True)], dim=-1)
    torch.testing.assert_close(REFERENCES["mocle"](state, x, base, hyper, inputs), folded(state, x, base, weights))


def folded(state, x, base, weights):
    """`W0 x + B ((s w) ⊙ A x)` with one weight vector `[B, E]` per sequence and ranks of 2."""
    per_rank = (1.5 * weights).repeat_interleave(2, dim=-1)[:, None]
    return base(x) + (per_rank * (x @ state["molora_A.weight"].T)) @ state["molora_B.weight"].T


def test_unequal_ranks_and_scales():
    """Every expert keeps its own."""
    state, x, base, hyper, inputs = case("selma")
    hyper.ranks, hyper.scales = [1, 3, 2], [0.5, 2.0, 3.0]
    per_rank = torch.tensor([0.5, 2, 2, 2, 3, 3]).double() / 3
    expected = base(x) + (per_rank * (x @ state["molora_A.weight"].T)) @ state["molora_B.weight"].T
    torch.testing.assert_close(REFERENCES["selma"](state, x, base, hyper, inputs), expected)
    halves = {key: value for key, value in state.items() if "_A" not in key and "_B" not in key}
    halves |= {"molora_frozen_A.weight": state["molora_A.weight"][:4], "molora_A.weight": state["molora_A.weight"][4:]}
    halves |= {"molora_frozen_B.weight": state["molora_B.weight"][:, :4]}
    halves |= {"molora_B.weight": state["molora_B.weight"][:, 4:]}
    torch.testing.assert_close(REFERENCES["selma"](halves, x, base, hyper, inputs), expected)


def test_flylora_with_every_rank_is_plain_lora():
    state, x, base, hyper, inputs = case("flylora", experts=4, top_k=4)
    expected = plain_lora(state, x, base, 1.5, 4)
    torch.testing.assert_close(REFERENCES["flylora"](state, x, base, hyper, inputs), expected)


def test_factor_mixes_have_cross_terms():
    """With equal A the mixed B is a mixture of outputs; with all different it is not."""
    state, x, base, hyper, inputs = case("lorahub")
    mixed = REFERENCES["lorahub"](state, x, base, hyper, inputs)
    assert not torch.allclose(mixed, REFERENCES["psec"](state, x, base, hyper, inputs))
    state["molora_A.weight"] = state["molora_A.weight"][:2].repeat(3, 1)
    total = state["molora_router.weight"].sum()
    mixed = REFERENCES["lorahub"](state, x, base, hyper, inputs) - base(x)
    torch.testing.assert_close(mixed, total * (REFERENCES["psec"](state, x, base, hyper, inputs) - base(x)))


def test_mhr_with_equal_splits_is_polytropon():
    state, x, base, hyper, inputs = case("polytropon")
    whole = REFERENCES["polytropon"](state, x, base, hyper, inputs)
    state["molora_router.weight"] = state["molora_router.weight"].repeat(1, 2)
    torch.testing.assert_close(REFERENCES["polytropon-mhr"](state, x, base, hyper, inputs), whole)


def test_mor1e_pairs_by_einsum():
    state, x, base, hyper, inputs = case("mor1e-pairs")
    share = torch.sigmoid(100 * state["molora_blend.token"])
    gate = 32 * share * torch.softmax(x @ state["molora_router.weight"].T, dim=-1)
    gate = (gate + 4 * (1 - share) * inputs["expert_scores"][:, None]).unflatten(-1, (3, 4))
    hidden = torch.einsum("bsi,bsij->bsj", x @ state["molora_A.weight"].T, gate)
    change = torch.sigmoid(100 * state["molora_blend.output"]) * 1.5 * hidden @ state["molora_B.weight"].T
    torch.testing.assert_close(REFERENCES["mor1e-pairs"](state, x, base, hyper, inputs), base(x) + change)


def test_mos_puts_the_shards_together():
    state, x, base, hyper, inputs = case("mos")
    matrix_a = state["molora_pool.weight_A"][state["molora_A.index"].long()].flatten(1)
    matrix_b = state["molora_pool.weight_B"][state["molora_B.index"].long()].flatten(1).T
    expected = base(x) + 1.5 * x @ matrix_a.T @ matrix_b.T
    torch.testing.assert_close(REFERENCES["mos"](state, x, base, hyper, inputs), expected)


def test_smear_and_becotta_read_the_output():
    """One expert: a bottleneck after the module; SMEAR's decision sees the prompt only."""
    for name, activation in (("smear", torch.nn.functional.silu), ("becotta", torch.nn.functional.gelu)):
        state, x, base, hyper, inputs = case(name, experts=1)
        z = base(x)
        hidden = activation(z @ state["molora_A.weight"].T + state.get("molora_A.bias", 0))
        expected = z + 1.5 * hidden @ state["molora_B.weight"].T
        torch.testing.assert_close(REFERENCES[name](state, x, base, hyper, inputs), expected)
    state, x, base, hyper, inputs = case("smear")
    before = REFERENCES["smear"](state, x, base, hyper, inputs)
    x[:, 3] += 1  # never part of a prompt here
    torch.testing.assert_close(REFERENCES["smear"](state, x, base, hyper, inputs)[:, :3], before[:, :3])


def test_phatgoose_ignores_the_size_of_its_gates_and_glider_follows_its_scores():
    state, x, base, hyper, inputs = case("phatgoose")
    before = REFERENCES["phatgoose"](state, x, base, hyper, inputs)
    state["molora_router.weight"] = 1e3 * state["molora_router.weight"] + 5
    torch.testing.assert_close(REFERENCES["phatgoose"](state, x, base, hyper, inputs), before, rtol=1e-4, atol=1e-4)
    state, x, base, hyper, inputs = case("glider", score_weight=1e3)
    inputs["expert_scores"] = torch.eye(3).double()
    chosen = folded(state, x, base, torch.eye(3).double())
    torch.testing.assert_close(REFERENCES["glider"](state, x, base, hyper, inputs), chosen)


def test_gradients_reach_every_parameter_of_a_selected_expert():
    for name in ("adamole", "hmoe", "x-lora", "smear", "polytropon-mhr", "mor1e-pairs"):
        state, x, base, hyper, inputs = case(name, max_threshold=0.2, top_p=0.99)
        unread = () if name == "adamole" else ("molora_threshold",)
        unread += () if name == "mor1e-pairs" else ("molora_blend",)
        state = {key: value.requires_grad_() for key, value in state.items() if not key.startswith(unread or ("-",))}
        REFERENCES[name](state, x, base, hyper, inputs).square().sum().backward()
        assert all(value.grad is not None and value.grad.abs().sum() > 0 for value in state.values()), name


def layer_norm(values):
    return torch.nn.functional.layer_norm(values, values.shape[-1:])


def only_top(values, k, by=None):
    """`values` at the k largest of `by`, 0 elsewhere."""
    chosen = (values if by is None else by).topk(k, dim=-1).indices
    return torch.zeros_like(values).scatter(-1, chosen, values.gather(-1, chosen))


def unit_sum(weights):
    return weights / weights.sum(-1, keepdim=True)


def whole_tensor_weights(name, state, x, inputs):
    """Mixing weights `[B, S, E]` of all tokens at once, with torch's own functions, for k = 2."""
    router = state["molora_router.weight"]
    a = state["molora_A.weight"]
    if name == "adamole":
        threshold = 0.3 * (x @ state["molora_threshold.weight"].T + state["molora_threshold.bias"]).sigmoid()
        above = ((x @ router.T).softmax(-1) - threshold).clamp(min=0)
        return above / above.sum(-1, keepdim=True).clamp(min=1e-300)
    if name == "arrow":
        similarity = (x @ router.T).abs()
        return (similarity / 0.5 + only_top(torch.zeros_like(similarity) + 1, 2, similarity).log()).softmax(-1)
    if name == "smora":
        return unit_sum(only_top((x @ router.T).sigmoid() + state["molora_bias.weight"], 2))
    if name == "flylora":
        activation = x @ a.T
        return only_top(torch.ones_like(activation), 2, (activation + state["molora_bias.weight"]).abs())
    if name == "recommended":
        normalised = (x - state["molora_router.input_mean"]) / state["molora_router.input_std"]
        shares = torch.nn.functional.linear(normalised, router, state["molora_router.bias"]).div(0.5).softmax(-1)
        return unit_sum(only_top(shares, 2, shares + state["molora_bias.weight"]))
    if name == "mora-cl":
        signal = torch.nn.functional.normalize(x @ a.T, dim=-1)
        return only_top((signal / 0.5).softmax(-1), 2) * (signal >= 0.2)
    if name == "aoe":
        return only_top(((x @ a.T).unflatten(-1, (3, 2)).norm(dim=-1) / 0.5).softmax(-1), 2)
    logits = layer_norm(x) @ layer_norm(router).T / D**0.5
    if name == "glider":
        logits = logits + 0.5 * inputs["expert_scores"][:, None]
    return unit_sum(only_top((logits / 0.5).softmax(-1), 2))


@pytest.mark.parametrize(
    "name", ["recommended", "adamole", "arrow", "smora", "flylora", "mora-cl", "aoe", "phatgoose", "glider"]
)
@pytest.mark.parametrize("seed", [0, 1])
def test_token_loops_agree_with_whole_tensors(name, seed):
    settings = {"max_threshold": 0.3, "top_k": 2, "min_logit": 0.2, "score_weight": 0.5}
    temperature = None if name in ("adamole", "smora") else 0.5
    state, x, base, hyper, inputs = case(name, seed=seed, temperature=temperature, **settings)
    weights = whole_tensor_weights(name, state, x, inputs).repeat_interleave(hyper.ranks[0], dim=-1)
    change = (1.5 * weights * (x @ state["molora_A.weight"].T)) @ state["molora_B.weight"].T
    torch.testing.assert_close(REFERENCES[name](state, x, base, hyper, inputs), base(x) + change)


def test_smear_shares_by_torch():
    state, x, base, hyper, inputs = case("smear", seed=3)
    z, mask = base(x), inputs["prompt_mask"].double()[..., None]
    mean = (z * mask).sum(1) / mask.sum(1)
    rows = layer_norm(state["molora_router.weight"]) * state["molora_router.weight_scale"]
    shares = layer_norm(mean) * state["molora_router.input_scale"] @ rows.T + state["molora_router.bias"]
    shares = shares.softmax(-1)
    mixed_a = torch.einsum("be,eri->bri", shares, state["molora_A.weight"].unflatten(0, (3, 2)))
    mixed_b = 1.5 * torch.einsum("be,oer->bor", shares, state["molora_B.weight"].unflatten(1, (3, 2)))
    bias = shares @ state["molora_A.bias"].unflatten(0, (3, 2))
    hidden = torch.nn.functional.silu(torch.einsum("bsi,bri->bsr", z, mixed_a) + bias[:, None])
    expected = z + torch.einsum("bsr,bor->bso", hidden, mixed_b)
    torch.testing.assert_close(REFERENCES["smear"](state, x, base, hyper, inputs), expected)
