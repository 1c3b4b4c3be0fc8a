"""X-LoRA and plain LoRAs of PEFT as molora adapters: the same outputs as PEFT's own models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from loras import IDS, MIXED, edit_config, save_lora
from peft import PeftModel, XLoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tiny import tiny_gpt2, tiny_llama

from molora import ConfigError, MoLoraConfig
from molora.commands import import_adapter as command
from molora.compose import compose
from molora.imported.foreign import import_adapter
from molora_cli.arguments import parse

WEIGHTS = "adapter_model.safetensors"
UNEQUAL = [MIXED[0], MIXED[1], MIXED[2]]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("bases")
    for name, model in (("llama", tiny_llama()), ("gpt2", tiny_gpt2())):
        model.config.save_pretrained(root / name)
    return {name: str(root / name) for name in ("llama", "gpt2")}


def save_xlora(folder: Path, loras: dict[str, Path], make: Any = tiny_llama, **fields: Any) -> tuple[Path, Any]:
    """Save an X-LoRA with a random classifier; returns PEFT's own model too.

    PEFT 0.21 leaves out what has the name of an adapter in its own, such as `layers.0` of the classifier; releases
    before it saved all of it, as here.
    """
    base = make()
    base.config.use_cache = False
    adapters = {name: str(path) for name, path in loras.items()}
    config = XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, adapters=adapters, **fields)
    model = get_peft_model(base, config).eval()
    torch.manual_seed(5)
    for parameter in model.base_model.internal_xlora_classifier.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    folder.mkdir()
    config.save_pretrained(str(folder))
    tensors = {name: tensor for name, tensor in model.state_dict().items() if "internal_xlora_classifier" in name}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)
    return folder, model


@pytest.fixture(scope="module")
def unequal(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("unequal")
    return {str(i): save_lora(root / f"lora{i}", i, **fields) for i, fields in enumerate(UNEQUAL)}


CASES: dict[str, dict[str, Any]] = {
    "one layer": {},
    "two layers": {"xlora_depth": 2, "xlora_size": 12},
    "two layers without dropout": {"xlora_depth": 2, "xlora_size": 12, "xlora_dropout_p": 0.0},
    "a scaling for each linear": {"layerwise_scalings": True},
    "two layers, a scaling for each linear": {"layerwise_scalings": True, "xlora_depth": 2, "xlora_size": 12},
    "temperature": {"softmax_temperature": 0.3},
    "global weight": {"global_scaling_weight": 2.5},
    "top 2": {"top_k_lora": 2},
    "no softmax": {"enable_softmax": False},
    "no softmax, top 2": {"enable_softmax": False, "top_k_lora": 2, "softmax_temperature": 0.5},
    "softmax of the top 2": {"enable_softmax": False, "enable_softmax_topk": True, "top_k_lora": 2},
    "softmax of the top 1": {"enable_softmax": False, "enable_softmax_topk": True, "top_k_lora": 1},
    "trainable LoRAs": {"use_trainable_adapters": True},
}


@pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
def test_an_x_lora_computes_what_peft_does_token_by_token(
    fields: dict[str, Any], unequal: dict[str, Path], bases: dict[str, str], tmp_path: Path
) -> None:
    folder, theirs = save_xlora(tmp_path / "theirs", unequal, **fields)
    import_adapter(folder, tmp_path / "ours", base_model=bases["llama"], adapters=unequal)
    ours = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "ours")).eval()
    with torch.no_grad():
        expected = theirs(input_ids=IDS).logits
        torch.testing.assert_close(ours(input_ids=IDS).logits, expected, rtol=1e-4, atol=2e-6)
        assert (expected - tiny_llama()(IDS).logits).abs().max() > 1e-2
        # The weights differ from token to token, which one decision a prompt would not give.
        scalings = theirs.base_model.get_latest_scalings()
        assert scalings[:, :, 0].std(dim=1).max() > 1e-2
    config = MoLoraConfig.from_pretrained(str(tmp_path / "ours"))
    config.base_model_name_or_path = None
    built = get_peft_model(tiny_llama(), config)
    expected_names = set(get_peft_model_state_dict(built))
    assert set(load_file(tmp_path / "ours" / WEIGHTS)) == expected_names


def test_generated_text_is_that_of_peft(unequal: dict[str, Path], bases: dict[str, str], tmp_path: Path) -> None:
    folder, theirs = save_xlora(tmp_path / "theirs", unequal)
    import_adapter(folder, tmp_path / "ours", base_model=bases["llama"], adapters=unequal)
    ours = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "ours")).eval()
    how = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(ours.generate(**how, use_cache=False), theirs.generate(**how))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"xlora_depth": 3}, "one layer or two"),
        ({"scaling_pass_value": 0.5}, "reads the model with its LoRAs on"),
        ({"enable_softmax_topk": True}, "a softmax of a softmax"),
        ({"top_k_lora": 4}, "top_k_lora: got 4"),
        ({"softmax_temperature": 0}, "softmax_temperature: got 0"),
        ({"global_scaling_weight": "2"}, "global_scaling_weight: got '2'"),
        ({"global_scaling_weight": "x"}, "global_scaling_weight: got 'x'"),
        ({"global_scaling_weight": None}, "global_scaling_weight: got None"),
        ({"global_scaling_weight": 10**400}, "global_scaling_weight: got 1000"),
        ({"softmax_temperature": 10**400}, "softmax_temperature: got 1000"),
        ({"top_k_lora": True}, "top_k_lora: got True"),
        ({"hidden_size": 16}, "[3, 16] is needed here"),
        ({"xlora_depth": 2}, "does not hold all 2 layers"),
        ({"adapters": ["a"]}, "must map names to folders"),
        ({"adapters": {}}, "must map names to folders"),
    ],
)
def test_an_x_lora_without_an_exact_equivalent_is_refused(
    changed: dict[str, Any], words: str, unequal: dict[str, Path], bases: dict[str, str], tmp_path: Path
) -> None:
    folder, _ = save_xlora(tmp_path / "theirs", unequal)
    edit_config(folder, **changed)
    with pytest.raises(ConfigError) as error:
        import_adapter(folder, tmp_path / "ours", base_model=bases["llama"], adapters=unequal)
    assert words in str(error.value)
    assert not (tmp_path / "ours").exists()


def test_a_classifier_that_peft_lost_at_saving_is_refused(
    unequal: dict[str, Path], bases: dict[str, str], tmp_path: Path
) -> None:
    folder, _ = save_xlora(tmp_path / "theirs", unequal, xlora_depth=2, xlora_size=12)
    kept = {name: tensor for name, tensor in load_file(folder / WEIGHTS).items() if ".0." not in name}
    save_file(kept, folder / WEIGHTS)
    with pytest.raises(ConfigError, match=r"take the tensors with 'internal_xlora_classifier'"):
        import_adapter(folder, tmp_path / "ours", base_model=bases["llama"], adapters=unequal)


def inside(folder: Path, loras: dict[str, Path], names: dict[str, str]) -> None:
    """Copy LoRAs into a folder under these names."""
    for name, place in names.items():
        target = folder / place
        target.mkdir(parents=True)
        for file in loras[name].iterdir():
            (target / file.name).write_bytes(file.read_bytes())


@pytest.mark.parametrize(
    ("listed", "places"),
    [
        ({"0": "/elsewhere/a", "1": "../b", "2": "someone/c"}, {"0": "0", "1": "1", "2": "2"}),
        ({"0": "a", "1": "loras/b", "2": "./c"}, {"0": "a", "1": "loras/b", "2": "c"}),
    ],
    ids=["named as they are", "by relative paths"],
)
def test_loras_in_the_folder_are_found_there(
    listed: dict[str, str], places: dict[str, str], unequal: dict[str, Path], bases: dict[str, str], tmp_path: Path
) -> None:
    folder, _ = save_xlora(tmp_path / "theirs", unequal)
    import_adapter(folder, tmp_path / "a", base_model=bases["llama"], adapters=unequal)
    inside(folder, unequal, places)
    edit_config(folder, adapters=listed, base_model_name_or_path=bases["llama"])
    import_adapter(folder, tmp_path / "b")
    first, second = (load_file(tmp_path / name / WEIGHTS) for name in "ab")
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.parametrize("path", ["{lora}", "../lora", "sub/../../lora", "link"])
def test_a_lora_outside_the_folder_is_read_only_if_the_user_gives_it(
    path: str, bases: dict[str, str], tmp_path: Path
) -> None:
    lora = save_lora(tmp_path / "lora", r=2, target_modules=["q_proj"])
    folder, _ = save_xlora(tmp_path / "theirs", {"0": lora})
    (folder / "sub").mkdir()
    (folder / "link").symlink_to(lora)
    edit_config(folder, adapters={"0": path.format(lora=lora)})
    with pytest.raises(ConfigError, match="lies outside the folder and is not read"):
        import_adapter(folder, tmp_path / "ours", base_model=bases["llama"])
    assert not (tmp_path / "ours").exists()
    given = import_adapter(folder, tmp_path / "ours", base_model=bases["llama"], adapters={"0": lora})
    assert given.preset == "x-lora"


@pytest.mark.parametrize("path", ["\0", "a\0b", "x" * 5000, "x/" * 5000, "loop"])
@pytest.mark.parametrize("named", [False, True])
def test_a_path_that_no_system_has_is_refused(path: str, named: bool, bases: dict[str, str], tmp_path: Path) -> None:
    lora = save_lora(tmp_path / "lora", r=2, target_modules=["q_proj"])
    folder, _ = save_xlora(tmp_path / "theirs", {"0": lora})
    (folder / "loop").symlink_to(folder / "loop")
    edit_config(folder, adapters={path: "gone"} if named else {"0": path})
    with pytest.raises(ConfigError, match="is not in the folder"):
        import_adapter(folder, tmp_path / "ours", base_model=bases["llama"])


@pytest.mark.parametrize("name", ["../lora", ".", "..", "/"])
def test_the_name_of_a_lora_leads_nowhere_either(name: str, bases: dict[str, str], tmp_path: Path) -> None:
    lora = save_lora(tmp_path / "lora", r=2, target_modules=["q_proj"])
    folder, _ = save_xlora(tmp_path / "theirs", {"0": lora})
    edit_config(folder, adapters={name: "gone"})
    with pytest.raises(ConfigError, match="is not in the folder"):
        import_adapter(folder, tmp_path / "ours", base_model=bases["llama"])


def test_the_order_of_adapters_is_kept_or_asked_for(
    unequal: dict[str, Path], bases: dict[str, str], tmp_path: Path
) -> None:
    folder, _ = save_xlora(tmp_path / "theirs", unequal)
    edit_config(folder, adapters={"a": "x", "b": "y", "c": "z"})
    given = {"c": unequal["0"], "a": unequal["1"], "b": unequal["2"]}
    ours = import_adapter(folder, tmp_path / "a", base_model=bases["llama"], adapters=given)
    assert [expert["name"] for expert in ours.config.imported_experts] == ["c", "a", "b"]
    assert not any("sorts them by name" in note for note in ours.notes)
    inside(folder, unequal, {"0": "a", "1": "b", "2": "c"})
    ours = import_adapter(folder, tmp_path / "b", base_model=bases["llama"])
    assert any("sorts them by name" in note for note in ours.notes)
    with pytest.raises(ConfigError, match="no adapter is called 'd'"):
        import_adapter(folder, tmp_path / "c", base_model=bases["llama"], adapters={"d": unequal["0"]})


@pytest.mark.parametrize("fields", MIXED)
def test_one_lora_computes_what_peft_does_and_can_be_trained_on(fields: dict[str, Any], tmp_path: Path) -> None:
    folder = save_lora(tmp_path / "lora", 3, **fields)
    imported = import_adapter(folder, tmp_path / "ours")
    with torch.no_grad():
        expected = PeftModel.from_pretrained(tiny_llama(), str(folder)).eval()(IDS).logits
        ours = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "ours"), is_trainable=True).eval()
        torch.testing.assert_close(ours(IDS).logits, expected, rtol=1e-4, atol=1e-6)
    assert imported.preset == "lora"
    assert any(parameter.requires_grad for parameter in ours.parameters())


@pytest.mark.parametrize("preset", ["arrow", "selma"])
def test_several_loras_become_the_mixture_that_compose_makes(
    preset: str, unequal: dict[str, Path], tmp_path: Path
) -> None:
    folders = list(unequal.values())
    import_adapter(folders, tmp_path / "ours", preset=preset)
    with torch.no_grad():
        ours = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "ours")).eval()(IDS).logits
        expected = compose(tiny_llama(), folders, preset).eval()(IDS).logits
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("preset", ["phatgoose", "x-lora", "lorahub", "lora"])
def test_mixtures_that_loras_do_not_determine_are_refused(
    preset: str, unequal: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError):
        import_adapter(list(unequal.values()), tmp_path / "ours", preset=preset)
    assert not (tmp_path / "ours").exists()


def test_the_base_model_must_be_that_of_the_loras(bases: dict[str, str], tmp_path: Path) -> None:
    folder = save_lora(tmp_path / "lora", target_modules=["q_proj"])
    with pytest.raises(ConfigError, match="which the base model does not have"):
        import_adapter(folder, tmp_path / "ours", base_model=bases["gpt2"])
    assert import_adapter(folder, tmp_path / "ours", base_model=bases["llama"]).modules == 2


@pytest.mark.parametrize("words", [["a"], ["a", "--preset", "arrow"], []])
def test_the_new_folder_must_be_named_too(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["import", *words])
    error = capsys.readouterr().err
    assert "molora import DIR OUT" in error or (not words and "DIR" in error)


def test_the_last_word_is_the_new_folder() -> None:
    assert parse(["import", "a", "b", "--preset", "arrow"]).directories == ["a", "b"]
    assert parse(["import", "--preset", "arrow", "a", "b", "c"]).directories == ["a", "b", "c"]


def test_the_command_prints_what_it_made_and_what_differs(
    unequal: dict[str, Path], bases: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = save_xlora(tmp_path / "theirs", unequal)
    words = [f"{name}={path}" for name, path in unequal.items()]
    out = str(tmp_path / "ours")
    assert command.run([str(folder)], out, base_model=bases["llama"], adapters=words) == 0
    printed = capsys.readouterr().out
    assert [word in printed for word in ("XLORA", "x-lora", "use_cache=False", "to rounding")] == [True] * 4
    assert command.run([str(unequal["0"])], str(tmp_path / "lora"), base_model=bases["llama"]) == 0
    printed = capsys.readouterr().out
    assert "molora generate" in printed
    assert "outputs are those of the original" in printed
    several = [str(unequal[name]) for name in "01"]
    assert command.run(several, str(tmp_path / "mixture"), base_model=bases["llama"]) == 0
    printed = capsys.readouterr().out
    assert "Each expert is one of the adapters, exactly; how they are mixed is new." in printed
    assert "of the original" not in printed
    with pytest.raises(ConfigError, match="must be NAME=DIR"):
        command.run([str(folder)], str(tmp_path / "b"), adapters=["0", "=x"])
    with pytest.raises(ConfigError, match="'0' is given twice"):
        command.run([str(folder)], str(tmp_path / "b"), adapters=["0=x", "0=y"])
