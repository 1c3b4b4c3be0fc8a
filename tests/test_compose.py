"""Trained adapters as experts: selected, searched, and composed without changing them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from loras import ATTENTION, IDS, save_lora
from peft import ArrowConfig, PeftModel, create_arrow_model, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import tiny_gpt2, tiny_llama, tiny_tokenizer

from molora import MoLoraConfig
from molora.bank import MoLoraLayer
from molora.compose import compose, lorahub
from molora.compose.bank import diversity, select_experts
from molora.compose.lorahub import search_weights, static_routers
from molora.compose.shots import encode_shots, read_shots, score_candidates, shot_loss
from molora.data import Example
from molora.errors import ConfigError, DataError, MoloraError
from molora.imported.folder import ImportedLora, read_lora, read_loras
from molora.prototypes import arrow_prototype


@pytest.mark.parametrize(("rank", "size_in", "size_out"), [(1, 9, 7), (4, 9, 7), (8, 5, 20), (8, 20, 5)])
def test_arrow_prototype_is_the_top_right_singular_vector(rank: int, size_in: int, size_out: int) -> None:
    a, b = torch.randn(rank, size_in), torch.randn(size_out, rank)
    expected = torch.linalg.svd(b.double() @ a.double())[2][0]
    prototype = arrow_prototype(a, b)
    assert torch.minimum((prototype - expected).norm(), (prototype + expected).norm()) < 1e-6
    torch.testing.assert_close(arrow_prototype(a, -b), arrow_prototype(a, b))
    assert not arrow_prototype(a, torch.zeros_like(b)).any()


def test_diversity_is_the_sum_of_absolute_cosines(folders: list[Path]) -> None:
    loras = read_loras(folders)
    similarity = diversity(loras)
    assert torch.equal(similarity, similarity.T)
    assert not similarity.diagonal().any()
    name = ATTENTION.format(0, "q")
    one, other = ({name: lora.factors[name]} for lora in loras[:2])
    pair = diversity([ImportedLora("a", {}, one), ImportedLora("b", {}, other)])[0, 1]
    expected = 0.0
    for half in (0, 1):
        a, b = torch.zeros(2, 32, 32)
        for target, source in ((a, one[name][half]), (b, other[name][half])):
            target[: source.shape[0], : source.shape[1]] = source
        expected += torch.cosine_similarity(a.flatten(), b.flatten(), dim=0).abs().item()
    assert pair.item() == pytest.approx(expected, rel=1e-5)
    same = diversity([ImportedLora("a", {}, one), ImportedLora("b", {}, one)])[0, 1]
    assert same.item() == pytest.approx(2.0)


def test_selection_drops_the_worst_and_takes_the_most_diverse() -> None:
    similarity = torch.tensor(
        [
            [0.0, 9.0, 1.0, 0.0, 0.0],
            [9.0, 0.0, 8.0, 0.0, 0.0],
            [1.0, 8.0, 0.0, 5.0, 0.0],
            [0.0, 0.0, 5.0, 0.0, 0.0],
            [0.0, 0.0, 0.0, 0.0, 0.0],
        ]
    )
    scores = [1.0, 2.0, 3.0, 4.0, 9.0]
    assert select_experts(scores, similarity, 2, pool=3) == [0, 2]
    assert select_experts(scores, similarity, 2) == [0, 3]  # a pool of 4: the last is never looked at
    assert select_experts(scores, similarity, 5) == [0, 1, 2, 3, 4]
    with pytest.raises(MoloraError, match="cannot select 6 of 5"):
        select_experts(scores, similarity, 6)
    with pytest.raises(MoloraError, match="at least 3"):
        select_experts(scores, similarity, 3, pool=2)
    with pytest.raises(MoloraError, match="smaller pool"):
        select_experts([0.0] * 40, torch.zeros(40, 40), 20)


def test_search_without_gradient_finds_the_minimum_and_leaves_the_random_state() -> None:
    import numpy as np

    seen: list[list[float]] = []

    def objective(weights: Any) -> float:
        seen.append(list(weights))
        return (weights[0] - 0.8) ** 2 + (weights[1] + 2.0) ** 2

    before = np.random.get_state()[1].tolist()
    found = search_weights(objective, 2, steps=200)
    assert np.random.get_state()[1].tolist() == before
    assert found == pytest.approx([0.8, -1.5], abs=0.05)
    assert seen[0] == [0.0, 0.0]
    assert all(abs(weight) <= 1.5 for weights in seen for weight in weights)
    assert search_weights(objective, 2, steps=200) == found
    seen.clear()
    search_weights(objective, 2)
    assert 40 <= len(seen) <= 50


def test_search_says_how_to_install_what_it_misses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cma", None)
    with pytest.raises(MoloraError, match=r"pip install .molora\[lorahub\]"):
        search_weights(lambda weights: 0.0, 2)


SHOTS = [
    Example([{"role": "user", "content": "hi"}], "there", "shots"),
    Example("a b ", "c d", "shots"),
    Example(None, "plain text", "shots"),
]


def test_candidates_are_scored_one_after_the_other_on_an_unchanged_model(folders: list[Path]) -> None:
    base, tokenizer = tiny_llama().train(), tiny_tokenizer()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    scores = score_candidates(base, folders, SHOTS, tokenizer)
    assert base.training
    assert all(parameter.requires_grad for parameter in base.parameters())
    assert before.keys() == base.state_dict().keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in base.state_dict().items())
    for folder, score in zip(folders, scores, strict=True):
        model = PeftModel.from_pretrained(tiny_llama(), str(folder)).eval()
        losses = []
        for row in encode_shots(SHOTS, tokenizer):
            ids = torch.tensor([row.prompt + row.completions[0]])
            labels = torch.tensor([[-100] * len(row.prompt) + row.completions[0]])
            losses.append(model(input_ids=ids, labels=labels).loss.item())
        assert score == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_examples_without_anything_to_score_are_refused(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="none of the 1 examples"):
        encode_shots([Example(None, "a", "shots")], tokenizer)
    with pytest.raises(DataError, match="no such file"):
        read_shots(str(tmp_path / "none.jsonl"))


STATIC = {"router": "static", "gate": "identity", "selection": "dense", "weights": "probability", "renormalize": False}
"""One free weight an expert and linear."""


def set_weights(model: Any, weights: list[float]) -> None:
    for router in static_routers(model, "default"):
        router.weight.data.copy_(torch.tensor(weights))


def peft_logits(dtype: torch.dtype, active: list[Path], base: Any = None) -> torch.Tensor:
    """What PEFT's own LoRA computes with one adapter, or with the sum of several."""
    base = tiny_llama() if base is None else base
    model = PeftModel.from_pretrained(base.to(dtype), str(active[0]), adapter_name=active[0].name)
    for folder in active[1:]:
        model.load_adapter(str(folder), adapter_name=folder.name)
    model.base_model.set_adapter([folder.name for folder in active])
    return model.eval()(IDS).logits


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-13)])
@pytest.mark.parametrize("frozen", [0, 2, 4])
def test_experts_compute_what_peft_computes(
    folders: list[Path], dtype: torch.dtype, tolerance: float, frozen: int
) -> None:
    model = compose(tiny_llama().to(dtype), folders, preset="static", **STATIC, frozen_experts=frozen).eval()

    def check(weights: list[float], expected: torch.Tensor) -> None:
        set_weights(model, weights)
        torch.testing.assert_close(model(IDS).logits, expected, rtol=tolerance, atol=tolerance)

    for index, folder in enumerate(folders):
        check([float(other == index) for other in range(4)], peft_logits(dtype, [folder]))
    check([1.0] * 4, peft_logits(dtype, folders))
    check([0.0] * 4, tiny_llama().to(dtype)(IDS).logits)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-13)])
def test_conv1d_experts_compute_what_peft_computes(tmp_path: Path, dtype: torch.dtype, tolerance: float) -> None:
    targets = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
    saved = [save_lora(tmp_path / f"lora{r}", r, model=tiny_gpt2(), r=r, use_rslora=True, **targets) for r in (3, 5)]
    model = compose(tiny_gpt2().to(dtype), saved, preset="static", **STATIC).eval()
    for weights, active in (([1.0, 0.0], saved[:1]), ([0.0, 1.0], saved[1:]), ([1.0, 1.0], saved)):
        set_weights(model, weights)
        expected = peft_logits(dtype, active, tiny_gpt2())
        torch.testing.assert_close(model(IDS).logits, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_factors_are_mixed_as_lorahub_does(tmp_path: Path, dtype: torch.dtype) -> None:
    saved = [
        save_lora(tmp_path / f"lora{alpha}", alpha, r=4, lora_alpha=alpha, target_modules=["q_proj", "up_proj"])
        for alpha in (3, 8)
    ]
    model = compose(tiny_llama().to(dtype), saved, preset="lorahub").eval()
    assert not any(parameter.requires_grad for parameter in model.parameters())
    weights = [0.5, -1.25]
    set_weights(model, weights)
    reference = tiny_llama().to(dtype)
    loras = read_loras(saved)
    for module in loras[0].factors:
        triples = [lora.factors[module] for lora in loras]
        b = sum(w * scale * b.to(dtype) for w, (_, b, scale) in zip(weights, triples, strict=True))
        a = sum(w * a.to(dtype) for w, (a, _, _) in zip(weights, triples, strict=True))
        reference.get_submodule(module).weight.data += b @ a
    tolerance = 1e-5 if dtype == torch.float32 else 1e-13
    torch.testing.assert_close(model(IDS).logits, reference(IDS).logits, rtol=tolerance, atol=tolerance)


def test_a_composed_static_mixture_merges_and_reloads_exactly(folders: list[Path], tmp_path: Path) -> None:
    model = compose(tiny_llama(), folders, preset="static", **STATIC).eval()
    set_weights(model, [0.5, -1.0, 0.25, 1.5])
    expected = model(IDS).logits
    model.save_pretrained(tmp_path / "mixture")
    again = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "mixture")).eval()
    assert torch.equal(again(IDS).logits, expected)
    torch.testing.assert_close(again.merge_and_unload()(IDS).logits, expected, rtol=1e-4, atol=1e-5)


def test_only_what_is_new_is_trained(folders: list[Path]) -> None:
    model = compose(tiny_llama(), folders, preset="static", **STATIC)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(".molora_router." in name for name in trained)
    model = compose(tiny_llama(), folders[:2], preset="static", **STATIC, num_experts=3, r=2, lora_alpha=2)
    assert any(".molora_A." in name for name, parameter in model.named_parameters() if parameter.requires_grad)
    set_weights(model, [1.0, 0.0, 1.0])  # a new expert starts as nothing
    torch.testing.assert_close(model.eval()(IDS).logits, peft_logits(torch.float32, folders[:1]), rtol=2e-6, atol=2e-6)


def test_arrow_routes_by_the_adapters_own_directions(folders: list[Path]) -> None:
    model = compose(tiny_llama(), folders)
    loras = read_loras(folders)
    for name, layer in model.named_modules():
        if not hasattr(layer, "molora_router"):
            continue
        weight = layer.molora_router["default"].weight
        for row, lora in zip(weight, loras, strict=True):
            pair = lora.factors.get(name.removeprefix("base_model.model."))
            torch.testing.assert_close(row, arrow_prototype(*pair[:2]).float() if pair else torch.zeros_like(row))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not torch.equal(model.eval()(IDS).logits, tiny_llama()(IDS).logits)


def test_gates_travel_from_their_adapters_into_the_mixture(folders: list[Path], tmp_path: Path) -> None:
    gated = []
    for folder in folders[:3]:
        model = compose(tiny_llama(), [folder], preset="phatgoose-gate")
        assert torch.equal(model.eval()(IDS).logits, model(IDS).logits)
        for name, parameter in model.named_parameters():
            if ".molora_router." in name:
                assert parameter.requires_grad
                parameter.data.normal_()
            else:
                assert not parameter.requires_grad
        model.save_pretrained(tmp_path / folder.name)
        gated.append(tmp_path / folder.name)
    loras = read_loras(gated)
    for lora, plain in zip(loras, read_loras(folders[:3]), strict=True):
        assert lora.description == plain.description
        assert lora.gates.keys() == lora.factors.keys() == plain.factors.keys()
        for module, (a, b, scale) in plain.factors.items():
            assert torch.equal(lora.factors[module][0], a)
            assert torch.equal(lora.factors[module][1], b)
            assert lora.factors[module][2] == scale
    model = compose(tiny_llama(), gated, preset="phatgoose")
    for name, layer in model.named_modules():
        if hasattr(layer, "molora_router"):
            weight = layer.molora_router["default"].weight
            for row, lora in zip(weight, loras, strict=True):
                assert torch.equal(row, lora.gates.get(name.removeprefix("base_model.model."), torch.zeros_like(row)))
    with pytest.raises(ConfigError, match="has no gate"):
        compose(tiny_llama(), folders, preset="phatgoose")


def test_a_single_molora_expert_is_read_like_a_lora(tmp_path: Path) -> None:
    fields = {"target_modules": ["q_proj", "up_proj"], "rank_pattern": {"up_proj": 3}, "alpha_pattern": {"q_proj": 5}}
    config = MoLoraConfig.from_preset("lora", **fields, use_rslora=True, init_weights=False)
    model = get_peft_model(tiny_llama(), config).eval()
    model.save_pretrained(tmp_path / "molora")
    mixture = compose(tiny_llama(), [tmp_path / "molora"], "static", **STATIC).eval()
    set_weights(mixture, [1.0])
    torch.testing.assert_close(mixture(IDS).logits, model(IDS).logits, rtol=2e-6, atol=2e-6)
    get_peft_model(tiny_llama(), MoLoraConfig(**fields)).save_pretrained(tmp_path / "mixture")
    with pytest.raises(ConfigError, match="num_experts: got 8") as caught:
        read_lora(tmp_path / "mixture")
    assert "selection" in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "fragment"),
    [
        ({"target_modules": ["q_proj"]}, "target_modules: follows from the adapters"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern: follows from the adapters"),
        ({"num_experts": 2}, "4 adapters are given"),
        ({"r": 3}, "r: holds for new experts only"),
        ({"toop_k": 3}, "Did you mean 'top_k'?"),
        ({"preset": "arow"}, "Did you mean 'arrow'?"),
        ({"preset": "phatgoose-gate"}, "4 adapters are given"),
        ({"preset": "lorahub"}, "all adapters need one rank"),
        ({"expert_activation": "gelu"}, "keep their meaning with None only"),
        ({"preset": "mixlora"}, "expert_scope: got 'ffn'"),
        ({"router_sharing": "weights"}, "router_sharing"),
    ],
)
def test_overrides_that_contradict_the_adapters(folders: list[Path], overrides: dict[str, Any], fragment: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(tiny_llama(), folders, **overrides)
    assert fragment in str(caught.value)


def test_adapters_of_other_base_models_are_refused(folders: list[Path], tmp_path: Path) -> None:
    wide = save_lora(tmp_path / "wide", model=tiny_llama(hidden_size=64), r=4, target_modules=["q_proj"])
    with pytest.raises(ConfigError, match="trained on one base model"):
        compose(tiny_llama(), [*folders, wide])
    base = tiny_llama()
    with pytest.raises(ConfigError, match="in this model it is 32 to 32"):
        compose(base, [wide], "static", router="none", renormalize=False)
    deep = save_lora(tmp_path / "deep", model=tiny_llama(num_hidden_layers=3), r=4, target_modules=["q_proj"])
    with pytest.raises(ConfigError, match="which the base model does not have"):
        compose(base, [deep], "selma", router="none")
    assert not any("molora" in name for name, _ in base.named_modules())


def test_lorahub_sets_one_vector_of_weights(folders: list[Path]) -> None:
    tokenizer = tiny_tokenizer()
    model = compose(tiny_llama(), folders, preset="lorahub", expert_layout="separate")
    shots = encode_shots(SHOTS, tokenizer)
    nothing = shot_loss(tiny_llama(), tokenizer, shots)
    weights = lorahub(model, SHOTS, tokenizer, steps=20)
    for router in static_routers(model, "default"):
        torch.testing.assert_close(router.weight.detach(), torch.tensor(weights))
    assert shot_loss(model.eval(), tokenizer, shots) + 0.05 * sum(map(abs, weights)) / 4 <= nothing
    with pytest.raises(MoloraError, match="no static router"):
        lorahub(compose(tiny_llama(), folders), SHOTS, tokenizer)


def test_arrow_computes_what_pefts_arrow_does(tmp_path: Path) -> None:
    saved = []
    for seed in range(3):
        folder = save_lora(tmp_path / str(seed), seed, r=4, lora_alpha=8 + seed, target_modules=["q_proj", "up_proj"])
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        for name in tensors:
            if "lora_A" in name:  # singular values far apart, so that PEFT's power iterations converge
                tensors[name] = tensors[name] * torch.tensor([4.0, 1.0, 0.3, 0.1])[:, None]
        save_file(tensors, path)
        saved.append(folder)
    config = ArrowConfig(top_k=2, router_temperature=0.7)
    theirs = create_arrow_model(tiny_llama(), [str(folder) for folder in saved], config).eval()
    ours = compose(tiny_llama(), saved, top_k=2, temperature=0.7).eval()
    torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("preset", ["arrow", "self-moe", "x-lora", "lora-bank", "psec", "selma"])
def test_every_way_to_mix_reloads_and_generates(folders: list[Path], tmp_path: Path, preset: str) -> None:
    model = compose(tiny_llama(), folders, preset=preset).eval()
    model.save_pretrained(tmp_path / "mixture")
    again = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "mixture")).eval()
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-6)
    config = again.peft_config["default"]
    assert config.num_experts == 4
    assert config.frozen_experts == (0 if preset == "lora-bank" else 4)
    cached, whole = (again.generate(input_ids=IDS, max_new_tokens=4, use_cache=cache) for cache in (True, False))
    assert torch.equal(cached, whole)


def test_a_config_made_from_adapters_brings_their_weights_to_any_model(folders: list[Path], tmp_path: Path) -> None:
    config = MoLoraConfig.from_adapters(folders, preset="selma", task_type="CAUSAL_LM")
    composed = compose(tiny_llama(), folders, preset="selma").eval()
    ids = torch.arange(5, 15).reshape(2, 5)
    with torch.no_grad():
        expected = composed(input_ids=ids).logits
        for _ in range(2):
            model = get_peft_model(tiny_llama(), config).eval()
            assert torch.equal(model(input_ids=ids).logits, expected)
        model.add_adapter("second", config)
        model.set_adapter("second")
        assert torch.equal(model(input_ids=ids).logits, expected)
        model.delete_adapter("second")
        model.save_pretrained(tmp_path)
        assert "imported_loras" not in (tmp_path / "adapter_config.json").read_text()
        loaded = PeftModel.from_pretrained(tiny_llama(), str(tmp_path)).eval()
        assert torch.equal(loaded(input_ids=ids).logits, expected)


@pytest.mark.parametrize("preset", ["x-lora", "self-moe", "selma", "lora-bank"])
def test_gates_that_came_with_adapters_concern_no_other_router(preset: str, tmp_path: Path) -> None:
    folder = save_lora(tmp_path / "lora", r=3, target_modules=["q_proj"])
    gate = compose(tiny_llama(), [folder], preset="phatgoose-gate")
    gate.save_pretrained(tmp_path / "gate")
    model = compose(tiny_llama(), [tmp_path / "gate", folder], preset=preset).eval()
    with torch.no_grad():
        assert model(input_ids=torch.arange(5, 10).reshape(1, 5)).logits.isfinite().all()


def test_shared_experts_may_be_imported_and_have_no_row_of_the_router(folders: list[Path]) -> None:
    model = compose(tiny_llama(), folders, "arrow", num_experts=len(folders) - 1, shared_experts=1)
    layer = next(module for module in model.modules() if isinstance(module, MoLoraLayer))
    assert len(layer.molora_router["default"].weight) == len(folders) - 1
    assert model(IDS).logits.isfinite().all()
