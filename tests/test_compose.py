"""Trained adapters as experts: read exactly or refused, selected, searched, and composed without changing them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import ArrowConfig, LoraConfig, PeftModel, create_arrow_model, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import tiny_gpt2, tiny_llama, tiny_tokenizer

import molora_cli
from molora import MoLoraConfig
from molora.compose import compose, lorahub
from molora.compose.bank import diversity, select_experts
from molora.compose.lorahub import search_weights, static_routers
from molora.compose.shots import encode_shots, read_shots, score_candidates, shot_loss
from molora.data import Example
from molora.errors import ConfigError, DataError, MoloraError
from molora.imported import description_mistakes, expert_at
from molora.imported.folder import ImportedLora, read_lora, read_loras
from molora.prototypes import arrow_prototype

ATTENTION = "model.layers.{}.self_attn.{}_proj"
MIXED: list[dict[str, Any]] = [
    {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj"]},
    {"r": 3, "lora_alpha": 5, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
    {
        "r": 2,
        "lora_alpha": 16,
        "target_modules": ["q_proj", "v_proj", "up_proj"],
        "rank_pattern": {"layers.1.self_attn.q_proj": 5, "up_proj": 1},
        "alpha_pattern": {r".*\.0\.self_attn\.v_proj": 7},
        "use_rslora": True,
    },
    {"r": 8, "lora_alpha": 8, "target_modules": "all-linear", "layers_to_transform": None},
]
"""Unequal rank, alpha, scaling, patterns and targets."""


def save_lora(folder: Path, seed: int = 0, model: Any = None, **fields: Any) -> Path:
    """Save a LoRA with random factors, as if it had been trained."""
    base = tiny_llama() if model is None else model
    torch.manual_seed(seed)
    peft_model = get_peft_model(base, LoraConfig(init_lora_weights=False, **fields))
    peft_model.save_pretrained(folder)
    # Random initial factors are for tests only; what trained adapters say is True.
    edit_config(folder, init_lora_weights=True)
    return folder


def edit_config(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("loras")
    return [save_lora(root / f"lora{seed}", seed, **fields) for seed, fields in enumerate(MIXED)]


def test_a_lora_is_read_as_peft_loads_it(folders: list[Path]) -> None:
    for folder, lora in zip(folders, read_loras(folders), strict=True):
        peft_model = PeftModel.from_pretrained(tiny_llama(), str(folder))
        layers = {
            name.removeprefix("base_model.model."): module
            for name, module in peft_model.named_modules()
            if "default" in getattr(module, "lora_A", {})
        }
        assert lora.name == folder.name
        assert lora.factors.keys() == layers.keys()
        for name, (a, b, scale) in lora.factors.items():
            torch.testing.assert_close(scale * b @ a, layers[name].get_delta_weight("default"))
            assert scale == layers[name].scaling["default"]
            assert expert_at(lora.description, name) == (layers[name].r["default"], scale)


def test_rank_is_zero_where_an_adapter_changes_nothing(folders: list[Path]) -> None:
    description = read_lora(folders[0]).description
    assert expert_at(description, ATTENTION.format(0, "k")) == (0, 0.0)
    assert expert_at(description, ATTENTION.format(0, "q")) == (4, 3.0)
    assert json.loads(json.dumps(description)) == description
    assert not list(description_mistakes([description]))


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        ({"r": 0}, "`r` is 0"),
        ({"r": True}, "`r` is True"),
        ({"rank_patern": {}}, "Did you mean 'rank_pattern'?"),
        ({"target_modules": "q_proj"}, "must be a list of full module names"),
    ],
)
def test_mistakes_in_a_description(folders: list[Path], change: dict[str, Any], fragment: str) -> None:
    description = read_lora(folders[0]).description | change
    assert any(fragment in mistake for mistake in description_mistakes([description]))


@pytest.mark.parametrize(
    ("fields", "fragment"),
    [
        ({"use_dora": True}, "use_dora: got True"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "lora_only"}, "must be 'none'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"target_parameters": ["w"]}, "target_parameters"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"init_lora_weights": "pissa"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "pissa_niter_4"}, "changed the base weight"),
        ({"init_lora_weights": "olora"}, "changed the base weight"),
        ({"init_lora_weights": "corda"}, "changed the base weight"),
        ({"init_lora_weights": "lora_ga"}, "changed the base weight"),
        ({"init_lora_weights": "loftq"}, "changed the base weight"),
        ({"alora_invocation_tokens": [1, 2]}, "activated LoRA"),
        ({"use_of_the_future": {"a": 1}}, "does not know the field"),
        ({"peft_type": "LOHA"}, "got 'LOHA'"),
        ({"r": 5}, "says 5"),
    ],
)
def test_what_is_no_sum_of_b_a_is_refused(tmp_path: Path, fields: dict[str, Any], fragment: str) -> None:
    folder = save_lora(tmp_path / "lora", r=4, target_modules=["q_proj"])
    edit_config(folder, **fields)
    with pytest.raises(ConfigError) as caught:
        read_lora(folder)
    assert fragment in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("init", [True, "gaussian", "orthogonal", "eva", "mica"])
def test_inits_that_leave_the_base_weight_alone_are_read(tmp_path: Path, init: Any) -> None:
    folder = save_lora(tmp_path / "lora", r=4, target_modules=["q_proj"])
    edit_config(folder, init_lora_weights=init, velora_config={"scale": 1.0})
    assert len(read_lora(folder).factors) == 2


@pytest.mark.parametrize(
    ("fields", "fragment"),
    [
        ({"target_modules": ["q_proj", "embed_tokens"]}, "lora_embedding_A"),
        ({"target_modules": ["q_proj"], "use_dora": True}, "lora_magnitude_vector"),
        ({"target_modules": ["q_proj"], "lora_bias": True}, "lora_B.bias"),
    ],
)
def test_tensors_that_are_no_factor_are_refused(tmp_path: Path, fields: dict[str, Any], fragment: str) -> None:
    folder = save_lora(tmp_path / "lora", model=tiny_llama(attention_bias=True), r=4, **fields)
    edit_config(folder, use_dora=False, lora_bias=False)  # as if the config did not tell
    with pytest.raises(ConfigError, match=fragment):
        read_lora(folder)


def test_factors_of_other_shapes_are_refused(tmp_path: Path) -> None:
    folder = save_lora(tmp_path / "conv", r=4, target_modules=["q_proj"])
    path = folder / "adapter_model.safetensors"
    save_file({name: tensor[:, :, None, None] for name, tensor in load_file(path).items()}, path)
    with pytest.raises(ConfigError, match="only linear layers"):
        read_lora(folder)


def test_all_folders_are_reported_together(tmp_path: Path) -> None:
    good = save_lora(tmp_path / "good", r=4, target_modules=["q_proj"])
    dora = save_lora(tmp_path / "dora", r=4, target_modules=["q_proj"])
    edit_config(dora, use_dora=True, bias="all")
    old = save_lora(tmp_path / "old", r=4, target_modules=["q_proj"])
    (old / "adapter_model.safetensors").rename(old / "adapter_model.bin")
    with pytest.raises(ConfigError) as caught:
        read_loras([good, good, dora, old, tmp_path / "none"])
    message = str(caught.value)
    for fragment in ("use_dora", "must be 'none'", "save it again", "is no folder", "is given twice"):
        assert fragment in message
    with pytest.raises(ConfigError, match="no adapter given"):
        read_loras([])


def test_names_are_as_long_as_they_must_be(tmp_path: Path) -> None:
    one, two = (save_lora(tmp_path / task / "last", r=4, target_modules=["q_proj"]) for task in ("sums", "dates"))
    assert [lora.name for lora in read_loras([one, two])] == ["sums/last", "dates/last"]
    assert [lora.name for lora in read_loras([one, read_lora(two, "mine")])] == ["last", "mine"]


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

IDS = torch.arange(4, 24).reshape(2, 10)


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


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    rows = [{"prompt": "a b ", "completion": "c d"}, {"prompt": "hi ", "completion": "there"}]
    (folder / "shots.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def words(out: Path, base: Path, folders: list[Path], *more: str) -> list[str]:
    adapters = [word for folder in folders for word in ("--adapter", str(folder))]
    return ["compose", str(out), "--base-model", str(base), *adapters, *more]


def test_the_command_writes_a_mixture(
    folders: list[Path], base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mixture"
    assert molora_cli.main(words(out, base_folder, folders, "--top_k", "2", "temperature=0.5")) == 0
    printed = capsys.readouterr().out
    assert "lora3" in printed
    assert "molora generate" in printed
    model = PeftModel.from_pretrained(tiny_llama(), str(out)).eval()
    assert (model.peft_config["default"].top_k, model.peft_config["default"].temperature) == (2, 0.5)
    expected = compose(tiny_llama(), folders, top_k=2, temperature=0.5).eval()
    assert torch.equal(model(IDS).logits, expected(IDS).logits)
    assert molora_cli.main(words(out, base_folder, folders)) == 2
    assert "already exists" in capsys.readouterr().err


def test_the_command_selects_and_searches_by_examples(
    folders: list[Path], base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mixture"
    shots = str(base_folder / "shots.jsonl")
    more = ["--preset", "lorahub", "--shots", shots, "--select", "2", "--expert_layout", "separate"]
    assert molora_cli.main(words(out, base_folder, folders, *more)) == 0
    assert "loss on examples" in capsys.readouterr().out
    assert len(PeftModel.from_pretrained(tiny_llama(), str(out)).peft_config["default"].imported_experts) == 2


@pytest.mark.parametrize(
    ("more", "fragment"),
    [
        (["--select", "2"], "give a file with --shots"),
        (["--preset", "lorahub"], "give a file with --shots"),
        (["--shots", "x.jsonl"], "leave it out"),
        (["--select", "9", "--shots", "x.jsonl"], "only 4 adapters"),
        (["--select", "2", "--shots", "none.jsonl"], "no such file"),
        (["--toop_k", "2"], "Did you mean 'top_k'?"),
        (["--top_k", "two"], "must be a whole number"),
        (["--preset", "arow"], "Did you mean 'arrow'?"),
        (["another"], "another"),
        (["--adapter", "nowhere"], "is no folder"),
    ],
)
def test_mistakes_of_the_command(
    folders: list[Path],
    tmp_path: Path,
    more: list[str],
    fragment: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "mixture"
    assert molora_cli.main(words(out, tmp_path, folders, *more)) == 2
    assert fragment in capsys.readouterr().err
    assert not out.exists()


def test_the_base_model_is_the_one_the_adapters_name(
    folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert molora_cli.main(["compose", str(tmp_path / "out"), "--adapter", str(folders[0])]) == 2
    assert "the adapters name none" in capsys.readouterr().err


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
