"""QLoRA from a run file: the keys are checked before anything is loaded, and the commands run on a quantised model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl import ModelConfig

import molora_cli
from molora import quantization
from molora.base import load_base
from molora.commands.session import load_model
from molora.errors import ConfigError, MoloraError
from molora.quantization import Quantization, QuantizationError
from molora.runfile import load_run_file
from molora.runfile.arguments import ModelArguments

pytest.importorskip("bitsandbytes", reason="`make test-quantization` installs it")

NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="float32")
KEYS = [field.name for field in dataclasses.fields(Quantization)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny.tiny_llama(hidden_size=64, num_key_value_heads=4).to(torch.bfloat16).save_pretrained(folder)
    tiny.tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved(base, tmp_path_factory):
    """The same model, quantised and then saved."""
    folder = tmp_path_factory.mktemp("saved")
    AutoModelForCausalLM.from_pretrained(base, quantization_config=NF4).save_pretrained(folder)
    tiny.tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def run_file(tmp_path, base, monkeypatch):
    """Write a run file of ten lines with further keys after them."""
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"a {index}", "completion": "bc"} for index in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = {
        "model_name_or_path": str(base),
        "preset": "adamole",
        "num_experts": 4,
        "datasets": [{"path": "rows.jsonl", "eval_path": "rows.jsonl", "eval_max_samples": 2}],
        "output_dir": "out",
        "max_steps": 3,
        "bf16": False,
    }
    content |= {"target_modules": "all-linear", "disable_tqdm": True, "learning_rate": 0.01, "logging_steps": 1}

    def write(**changes):
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump({**content, "eval_max_new_tokens": 2, **changes}, sort_keys=False))
        return str(path)

    return write


def line_of(path, key):
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    return next(number for number, line in enumerate(lines, 1) if line.startswith(f"{key}:"))


@pytest.mark.parametrize(
    ("given", "key", "message"),
    [
        ({"load_in_4bit": True, "load_in_8bit": True}, "load_in_8bit", "in 8 bits or in 4"),
        ({"bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type", "no effect without `load_in_4bit: true`"),
        ({"use_bnb_nested_quant": True}, "use_bnb_nested_quant", "no effect without `load_in_4bit: true`"),
        ({"load_in_8bit": True, "bnb_4bit_quant_storage": "uint8"}, "bnb_4bit_quant_storage", "no effect without"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf5"}, "bnb_4bit_quant_type", "allowed are 'nf4', 'fp4'"),
        ({"load_in_4bit": True, "bnb_4bit_quant_storage": "int3"}, "bnb_4bit_quant_storage", "allowed are 'uint8'"),
        ({"load_in_4bit": "yes"}, "load_in_4bit", "must be true or false. Write true"),
        ({"bnb_4bit_use_double_quant": True}, "bnb_4bit_use_double_quant", "is called `use_bnb_nested_quant`"),
        ({"bnb_4bit_compute_dtype": "bfloat16"}, "bnb_4bit_compute_dtype", "follows `dtype`"),
    ],
)
def test_a_mistake_names_its_line(given, key, message, run_file):
    path = run_file(**given)
    with pytest.raises(ConfigError) as caught:
        load_run_file(path)
    (problem,) = caught.value.problems
    assert (problem.field, problem.where) == (key, f"{path}:{line_of(path, key)}")
    assert message in problem.message


@pytest.mark.parametrize("key", ["load_in_4bit", "load_in_8bit"])
def test_a_missing_package_is_named_before_anything_is_loaded(key, run_file, monkeypatch):
    monkeypatch.setattr(quantization, "is_bitsandbytes_available", lambda: False)
    path = run_file(**{key: True, "model_name_or_path": "nobody/nothing"})
    with pytest.raises(ConfigError, match=rf'run.yaml:\d+: {key}: needs .*: pip install "molora\[quantization\]"'):
        load_run_file(path)
    load_run_file(run_file(**{key: False}))


def test_the_keys_and_their_defaults_are_those_of_trl():
    theirs = {field.name: field.default for field in dataclasses.fields(ModelConfig)}
    for kind in (Quantization, ModelArguments):
        ours = {field.name: field.default for field in dataclasses.fields(kind)}
        assert {key: ours[key] for key in KEYS} == {key: theirs[key] for key in KEYS}
    assert {key for key in theirs if "bnb" in key or "bit" in key} == set(KEYS)


@pytest.mark.parametrize("dtype", ["auto", "float32"])
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"load_in_4bit": True}, ("Linear4bit", "nf4", False, torch.uint8)),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, ("Linear4bit", "fp4", False, torch.uint8)),
        (
            {"load_in_4bit": True, "use_bnb_nested_quant": True, "bnb_4bit_quant_storage": "bfloat16"},
            ("Linear4bit", "nf4", True, torch.bfloat16),
        ),
        ({"load_in_8bit": True}, ("Linear8bitLt", None, None, torch.int8)),
        ({}, ("Linear", None, None, None)),
    ],
)
def test_the_model_is_loaded_as_the_keys_say(given, expected, dtype, run_file):
    model, _ = load_model(load_run_file(run_file(dtype=dtype, **given)))
    linear = model.model.layers[0].mlp.up_proj
    computed = torch.bfloat16 if dtype == "auto" else torch.float32
    state = getattr(linear.weight, "quant_state", None)
    found = (state.quant_type, state.nested) if state is not None else (None, None)
    stored = linear.weight.dtype if given else None
    assert (type(linear).__name__, *found, stored) == expected
    assert {model.lm_head.weight.dtype, model.model.norm.weight.dtype} == {computed}
    assert getattr(linear, "compute_dtype", computed) == computed
    assert not any(p.requires_grad for p in linear.parameters()) or not given


@pytest.mark.parametrize("options", [Quantization(load_in_4bit=True), Quantization(load_in_8bit=True)])
def test_a_quantised_checkpoint_is_not_quantised_again(options, saved, run_file):
    with pytest.raises(QuantizationError, match="is quantised already with bitsandbytes"):
        load_base(str(saved), quantization=options)
    key = "load_in_4bit" if options.load_in_4bit else "load_in_8bit"
    with pytest.raises(ConfigError, match=rf"run.yaml:\d+: {key}: .*is quantised already"):
        load_model(load_run_file(run_file(model_name_or_path=str(saved), **{key: True})))


@pytest.mark.parametrize(
    ("method", "package"), [("gptq", "optimum"), ("awq", "gptqmodel"), ("aqlm", "aqlm"), ("eetq", "kernels")]
)
def test_a_checkpoint_of_a_library_that_is_missing_names_the_package(method, package, base, tmp_path):
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": 32, "zero_point": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(base / "model.safetensors")
    tiny.tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(MoloraError, match=f"(?i)cannot load .*{package}") as caught:
        load_base(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_an_hqq_checkpoint_is_refused_where_transformers_would_leave_its_weights_out(base, run_file, tmp_path):
    config = json.loads((base / "config.json").read_text())
    scheme = {"weight_quant_params": {"nbits": 4, "group_size": 32}}
    config["quantization_config"] = {"quant_method": "hqq", "quant_config": scheme, "skip_modules": ["lm_head"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(base / "model.safetensors")
    with pytest.raises(
        ConfigError, match=r"run.yaml:\d+: model_name_or_path: .*quantised with HQQ, which this version"
    ):
        load_model(load_run_file(run_file(model_name_or_path=str(tmp_path))))


def test_options_that_contradict_each_other_are_refused_in_python_too(base):
    with pytest.raises(QuantizationError, match=r"load_in_8bit: .*in 8 bits or in 4.*"):
        load_base(str(base), quantization=Quantization(load_in_4bit=True, load_in_8bit=True))


def losses(folder):
    state = json.loads((folder / "checkpoint-3/trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


@pytest.mark.parametrize(
    "given",
    [{"load_in_4bit": True, "use_bnb_nested_quant": True}, {"load_in_8bit": True}, {"model_name_or_path": None}],
    ids=["nf4", "int8", "checkpoint"],
)
def test_train_plan_and_generate_run_on_a_quantised_model(given, saved, run_file, tmp_path, capsys):
    given = {key: str(saved) if key == "model_name_or_path" else value for key, value in given.items()}
    path = run_file(save_strategy="steps", save_steps=3, **given)
    assert molora_cli.main(["plan", path]) == 0
    assert molora_cli.main(["train", path]) == 0, capsys.readouterr().err
    first, *_, last = losses(tmp_path / "out")
    assert last < first
    assert molora_cli.main(["generate", "out", "--prompt", "a", "--max-new-tokens", "2"]) == 0
    assert all(value.isfinite().all() for value in load_file(tmp_path / "out/adapter_model.safetensors").values())
    resolved = load_run_file("out/molora_run.yaml")
    assert Quantization.of(resolved.model) == Quantization.of(load_run_file(path).model)


def test_an_adapter_of_a_quantised_run_is_trained_on(run_file, tmp_path):
    assert molora_cli.main(["train", run_file(load_in_4bit=True, evaluate_tasks=False)]) == 0
    more = run_file(
        load_in_4bit=True, evaluate_tasks=False, adapter_name_or_path="out", output_dir="more", learning_rate=0
    )
    assert molora_cli.main(["train", more]) == 0
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("out", "more"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key].float(), after[key].float()) for key in before)


@pytest.mark.parametrize(
    "content", [None, {"model_name_or_path": "x"}, {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}]
)
def test_how_a_base_was_loaded_is_read_beside_its_adapter(content, tmp_path):
    if content is not None:
        (tmp_path / "molora_run.yaml").write_text(yaml.safe_dump(content))
    known = {key: value for key, value in (content or {}).items() if key in KEYS}
    assert Quantization.of_run(str(tmp_path)) == Quantization(**known)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        Quantization(),
        Quantization(load_in_4bit=True),
        Quantization(load_in_4bit=True, use_bnb_nested_quant=True),
        Quantization(load_in_8bit=True),
    ],
)
def test_the_size_of_a_loaded_model_is_known_before(options, tied, tmp_path):
    sizes = {"hidden_size": 256, "intermediate_size": 512, "tie_word_embeddings": tied}
    plain = tiny.tiny_llama(**sizes)
    plain.save_pretrained(tmp_path)
    tiny.tiny_tokenizer().save_pretrained(tmp_path)
    model, _ = load_base(str(tmp_path), quantization=options)
    actual = sum(value.nbytes for key, value in model.state_dict().items() if key != "lm_head.weight" or not tied)
    # What quantising adds to each linear beside its scales: tables and descriptions.
    spare = 1500 * sum(isinstance(module, nn.Linear) for module in model.modules()) if options.asked else 0
    predicted = options.bytes_of(plain.requires_grad_(False))
    assert actual - spare <= predicted <= actual


def test_the_shipped_run_file_loads():
    run = load_run_file(Path(__file__).parent.parent / "configs/qlora.yaml")
    assert run.model.load_in_4bit
    assert run.datasets
