"""The plug-in for vLLM on a stand-in: what an engine cannot serve, and folders that are damaged or hold no mixture."""

from __future__ import annotations

from types import SimpleNamespace

import plugin_engine
import pytest
import torch
from loras import edit_config
from methods import build
from plugin_engine import ATTENTION, Engine, part
from safetensors.torch import load_file
from vllm_stand_in import SLOTS

from molora.plain.fixed import layers_of
from molora.serving.pack import pack

vllm, plugin, engine, adapters = plugin_engine.vllm, plugin_engine.plugin, plugin_engine.engine, plugin_engine.adapters

REFUSALS = {
    "fully sharded": ({"fully_sharded_loras": True}, "recommended", "--fully-sharded-loras.*leave it out"),
    "too small": ({"max_lora_rank": 8}, "recommended", r"rank \d+.*room for 8; start it with --max-lora-rank (\d+)"),
    "restricted": ({"target_modules": ["o_proj"]}, "recommended", "--lora-target-modules allows o_proj only"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_an_engine_cannot_serve_is_refused_with_the_remedy(case, vllm, plugin, adapters):
    fields, name, said = REFUSALS[case]
    engine = Engine(vllm, plugin, **fields)
    if case == "restricted":
        for linear in [linear for linear in engine.layers if not linear.endswith("o_proj")]:
            del engine.manager.modules[linear]
    with pytest.raises(ValueError, match=said) as error:
        engine.load(adapters(name)[0])
    if case == "too small":
        needed = max(len(a) for a in packed_of(adapters, name))
        assert f"rank {needed}," in str(error.value)
        assert f"--max-lora-rank {next(r for r in (16, 32, 64) if r >= needed)}" in str(error.value)


def packed_of(adapters, name):
    layers = layers_of(adapters(name)[1], "default").values()
    return [pack(layer, "default", torch.float32).a for layer in layers]


def test_dual_stream_is_refused(vllm, plugin, adapters):
    engine = Engine(vllm, plugin)
    vllm["vllm.envs"].VLLM_LORA_ENABLE_DUAL_STREAM = True
    with pytest.raises(ValueError, match="VLLM_LORA_ENABLE_DUAL_STREAM; unset it"):
        engine.load(adapters("recommended")[0])


def test_other_devices_are_refused(engine, adapters):
    engine.manager.device = torch.device("meta")
    with pytest.raises(ValueError, match="this is meta"):
        engine.load(adapters("recommended")[0])


def test_a_linear_that_the_engine_does_not_have_is_refused(engine, tmp_path):
    build("mole", target_modules=["q_proj", "o_proj"]).save_pretrained(tmp_path / "adapter")
    del engine.manager.modules[ATTENTION.format(0) + "o_proj"]
    with pytest.raises(ValueError, match=r"adapts .*o_proj, where this engine has no linear for LoRAs"):
        engine.load(tmp_path / "adapter")


def test_a_router_that_normalises_is_refused_where_its_input_is_divided(vllm, plugin, adapters):
    engine = Engine(vllm, plugin, tp_size=2)
    with pytest.raises(ValueError, match=r"o_proj cannot be routed here: .*tensor_parallel_size=1"):
        engine.load(adapters("cosine")[0])


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"x"), "damaged adapter_model.safetensors"),
        (lambda folder: edit_config(folder, num_experts=3), "does not fit the base model"),
        (lambda folder: edit_config(folder, modules_to_save=["lm_head"]), "cannot be served: it trained more"),
    ],
    ids=["damaged", "other experts", "unservable"],
)
def test_a_folder_that_is_not_whole_is_an_error_for_the_request_alone(spoil, said, engine, tmp_path):
    folder = tmp_path / "adapter"
    build("mole").save_pretrained(folder)
    spoil(folder)
    with pytest.raises(ValueError, match=said) as error:
        engine.load(folder)
    assert str(error.value).startswith("adapter 1: ")
    assert engine.manager.lora_index_to_id == [None] * SLOTS


def test_a_config_that_cannot_be_read_is_named(plugin, tmp_path):
    plugin.register()
    (tmp_path / "adapter_config.json").write_text('{"r": 4,')
    with pytest.raises(ValueError, match=r"adapter_config\.json cannot be read"):
        part("adapter").holds_mixture(str(tmp_path))


@pytest.mark.parametrize("text", ["[]", '{"peft_type": "LORA"}', "{}", None])
def test_a_folder_that_says_no_mixture_is_vllms_to_read(text, plugin, tmp_path):
    plugin.register()
    if text is not None:
        (tmp_path / "adapter_config.json").write_text(text)
    assert not part("adapter").holds_mixture(str(tmp_path))


def test_without_the_plug_in_a_mixture_is_refused(vllm, adapters):
    """Its tensors have names that vLLM does not know, so it is never served without its routing."""
    worker = vllm["vllm.lora.worker_manager"].WorkerLoRAManager(None)
    folder, _ = adapters("recommended")
    for key in load_file(folder / "adapter_model.safetensors"):
        with pytest.raises(ValueError, match="unsupported LoRA weight"):
            vllm["vllm.lora.utils"].parse_fine_tuned_lora_name(key)
    with pytest.raises((ValueError, KeyError)):
        worker._load_adapter(SimpleNamespace(lora_path=str(folder), lora_int_id=1))
