"""Every published method, one preset each: its equation, its gradients, and what every adapter must be able to do."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import methods
import pytest
import torch
from accelerate import cpu_offload
from methods import SETTINGS, build, hyper_of, inputs_of, layers_of, state_of, tokens, watched
from peft import PeftModel, save_as_lora
from references import REFERENCES

from molora import MergeError, MoloraError, available_presets
from molora.routing.scope import RoutingCall, RoutingInputs

METHODS = sorted(SETTINGS)
IN_BLOCKS = ("mixlora", "mixlora-dynamic")
NEEDS_INPUTS = ["moelora", "mocle", "becotta", "polytropon", "polytropon-mhr", "mor1e", "mor1e-pairs", "glider"]
SAMPLES_IN_TRAINING = {"polytropon", "polytropon-mhr", "becotta", "mocle", "sira", "smear"}


def test_every_preset_is_tested_and_has_a_reference():
    assert sorted(available_presets()) == METHODS
    assert sorted(REFERENCES) == METHODS


def _prompt(mask):
    return {} if mask is None else {"prompt_mask": mask}


def _reference_inputs(model, layer, seen, given):
    """What a reference is told besides the module's own input."""
    group = layer.molora_group.get("default")
    inputs = {**given, "prompt_mask": torch.ones(3, 6, dtype=torch.bool)}
    plan = layer.molora_plan["default"]
    if plan.router_input == "base":
        with model.disable_adapter(), torch.no_grad():
            inputs["decision"] = model.base_model.model.model(input_ids=tokens()).last_hidden_state[:, -1]
    elif group is not None and group.decides_once:
        leader = next(name for name, other in layers_of(model).items() if other is group.leader)
        inputs["decision"] = seen[leader].x
    return inputs


@pytest.mark.parametrize("preset", [name for name in METHODS if name not in IN_BLOCKS])
def test_the_output_is_the_papers_equation(preset):
    model = build(preset).double()
    config, given = model.peft_config["default"], inputs_of(model)
    with watched(model) as seen, torch.no_grad():
        model(input_ids=tokens(), **given)
    for name, layer in layers_of(model).items():
        notes = seen[name]
        inputs = _reference_inputs(model, layer, seen, given)
        hyper = hyper_of(config, layer.molora_plan["default"])
        expected = REFERENCES[preset](state_of(layer), notes.x, lambda x, notes=notes: notes.base, hyper, inputs)
        torch.testing.assert_close(notes.y, expected, rtol=1e-9, atol=1e-11)
        base = notes.base[0] if isinstance(notes.base, tuple) else notes.base
        assert not torch.equal(notes.y, base) or preset in ("adamoe", "mora-cl")


@pytest.mark.parametrize("kind", methods.MOE_MODELS)
def test_experts_beside_a_base_models_own_mixture(kind):
    model = build("perft", kind).double()
    with watched(model) as seen, torch.no_grad():
        model(input_ids=tokens())
    for name, layer in layers_of(model).items():
        hyper = hyper_of(model.peft_config["default"], layer.molora_plan["default"])
        base = seen[name].base
        expected = REFERENCES["perft"](state_of(layer), seen[name].x, lambda x, base=base: base, hyper, {})
        torch.testing.assert_close(seen[name].y, expected, rtol=1e-9, atol=1e-11)
    assert len(seen) == 2


@pytest.mark.parametrize("preset", IN_BLOCKS)
def test_experts_that_span_a_feed_forward_block_are_whole_blocks(preset):
    model = build(preset).double()
    config = model.peft_config["default"]
    mlp = model.base_model.model.model.layers[1].mlp
    linears = {name: getattr(mlp, name) for name in ("gate_proj", "up_proj", "down_proj")}
    state = {f"{name}.{key}": value for name, layer in linears.items() for key, value in state_of(layer).items()}
    state = {key: value for key, value in state.items() if "router" not in key or key.startswith("gate_proj")}
    base = SimpleNamespace(
        gate=linears["gate_proj"].base_layer,
        up=linears["up_proj"].base_layer,
        down=linears["down_proj"].base_layer,
        act=mlp.act_fn,
    )
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    hyper = hyper_of(config, linears["gate_proj"].molora_plan["default"])
    with torch.no_grad():
        torch.testing.assert_close(mlp(x), REFERENCES[preset](state, x, base, hyper, {}), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("preset", [name for name in METHODS if name not in (*IN_BLOCKS, "mos")])
def test_every_gradient_is_that_of_the_equation(preset):
    """Of the first adapted module, with respect to its input and all its parameters."""
    model = build(preset).double()
    layer = next(iter(layers_of(model).values()))
    config, plan, given = model.peft_config["default"], layer.molora_plan["default"], inputs_of(model)
    size = layer.in_features
    base = torch.nn.Linear(size, layer.out_features, bias=False, dtype=torch.float64).requires_grad_(False)
    layer.base_layer = base
    x = torch.randn(3, 6, size, dtype=torch.float64, requires_grad=True)
    inputs = {**given, "prompt_mask": torch.ones(3, 6, dtype=torch.bool)}
    shared = {}
    if plan.router_input == "base":
        shared["base_hidden"] = torch.randn(3, 6, layer.molora_group["default"].feature_size, dtype=torch.float64)
        inputs["decision"] = shared["base_hidden"][:, -1]
    elif "default" in layer.molora_group and layer.molora_group["default"].decides_once:
        inputs["decision"] = x
    state = {name: value.clone().requires_grad_(value.is_floating_point()) for name, value in state_of(layer).items()}
    expected = REFERENCES[preset](state, x, base, hyper_of(config, plan), inputs)
    call = RoutingCall(RoutingInputs(**given), prompt=inputs["prompt_mask"], batch=3, shared=shared)
    with layer.routing_scope.running(call):
        got = layer(x)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)
    direction = torch.randn_like(expected)
    trained = {name.replace(".default.", "."): p for name, p in layer.named_parameters() if p.requires_grad}
    ours = torch.autograd.grad((got * direction).sum(), [x, *trained.values()], allow_unused=True)
    theirs = torch.autograd.grad(
        (expected * direction).sum(), [x, *(state[name] for name in trained)], allow_unused=True
    )
    for name, a, b in zip(["x", *trained], ours, theirs, strict=True):
        zero = torch.zeros(()).double()
        torch.testing.assert_close(
            zero if a is None else a, zero if b is None else b.expand_as(a), rtol=1e-7, atol=1e-9, msg=name
        )


@pytest.mark.parametrize("preset", METHODS)
def test_an_adapter_reloads_in_a_new_process_bit_for_bit(preset, tmp_path):
    model = build(preset)
    given = inputs_of(model)
    with torch.no_grad():
        expected = model(input_ids=tokens(), **given).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(methods.base_model(preset), tmp_path, adapter_name="other").eval()
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=tokens(), **given).logits, expected)
    low = PeftModel.from_pretrained(methods.base_model(preset), tmp_path, low_cpu_mem_usage=True).eval()
    with torch.no_grad():
        assert torch.equal(low(input_ids=tokens(), **given).logits, expected)


@pytest.mark.parametrize("preset", METHODS)
def test_an_offloaded_adapter_gives_the_same_output(preset):
    """Its values only exist while a module's own forward runs, as under FSDP."""
    model = build(preset).double()  # their products are taken one by one, which rounds otherwise
    given = inputs_of(model)
    with torch.no_grad():
        expected = model(input_ids=tokens(), **given).logits
        cpu_offload(model, execution_device="cpu")
        torch.testing.assert_close(model(input_ids=tokens(), **given).logits, expected)


@pytest.mark.parametrize("preset", IN_BLOCKS)
def test_a_block_whose_linears_have_biases_keeps_their_dtype_under_autocast(preset):
    model = build(preset, kind="gpt2")
    dtypes = set()
    for layer in layers_of(model).values():
        layer.register_forward_hook(lambda module, args, output: dtypes.add(output.dtype))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        model(input_ids=tokens())
    assert dtypes == {torch.bfloat16}


def test_all_adapters_reload_in_one_new_process(tmp_path):
    """What a folder holds is enough: a fresh interpreter, no object of this one."""
    expected = {}
    for preset in METHODS:
        model = build(preset)
        model.save_pretrained(tmp_path / preset)
        with torch.no_grad():
            expected[preset] = (inputs_of(model), model(input_ids=tokens(), **inputs_of(model)).logits)
    torch.save(expected, tmp_path / "expected.pt")
    script = f"""
import sys; sys.path.insert(0, {str(methods.__file__).removesuffix("methods.py")!r})
import torch, molora, methods
from peft import PeftModel, save_as_lora
torch.set_num_threads(1)
for preset, (given, logits) in torch.load({str(tmp_path / "expected.pt")!r}).items():
    model = PeftModel.from_pretrained(methods.base_model(preset), {str(tmp_path)!r} + "/" + preset).eval()
    with torch.no_grad():
        assert torch.equal(model(input_ids=methods.tokens(), **given).logits, logits), preset
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300)


@pytest.mark.parametrize("preset", METHODS)
def test_generation_with_cache_equals_without(preset):
    model = build(preset)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0, **inputs_of(model)}
    ids = tokens()
    mask = torch.ones_like(ids)
    with_cache = model.generate(input_ids=ids, attention_mask=mask, **options)
    assert torch.equal(with_cache, model.generate(input_ids=ids, attention_mask=mask, use_cache=False, **options))
    beams = model.generate(input_ids=ids, attention_mask=mask, num_beams=2, **options)
    alone = [
        model.generate(
            input_ids=ids[[row]],
            attention_mask=mask[[row]],
            num_beams=2,
            **{**options, **{name: value[[row]] for name, value in inputs_of(model).items()}},
        )
        for row in range(3)
    ]
    assert torch.equal(beams, torch.cat(alone))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("preset", METHODS)
def test_neither_padding_nor_other_rows_change_a_row(preset, side):
    model = build(preset)
    given, ids = inputs_of(model), tokens()
    pad = (3, 0) if side == "left" else (0, 3)
    padded = torch.nn.functional.pad(ids, pad)
    mask = torch.nn.functional.pad(torch.ones_like(ids), pad)
    real = slice(3, None) if side == "left" else slice(None, 6)
    with torch.no_grad():
        together = model(input_ids=padded, attention_mask=mask, **given).logits[:, real]
        for row in range(3):
            alone = model(
                input_ids=ids[[row]],
                attention_mask=torch.ones_like(ids[[row]]),
                **{name: value[[row]] for name, value in given.items()},
            ).logits
            torch.testing.assert_close(together[[row]], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("preset", METHODS)
def test_disabled_it_is_the_base_model_and_unloaded_too(preset):
    model = build(preset)
    given = inputs_of(model)
    with torch.no_grad():
        expected = methods.base_model(preset)(input_ids=tokens()).logits
        assert not torch.equal(model(input_ids=tokens(), **given).logits, expected)
        with model.disable_adapter():
            assert torch.equal(model(input_ids=tokens()).logits, expected)
        assert torch.equal(model.unload()(input_ids=tokens()).logits, expected)


IDENTITY_UP_TO_ROUNDING = {"mixlora"}
NO_IDENTITY = {"mixlora-dynamic"}
"""Its weights do not sum to one, and the frozen block is inside the mixture."""


@pytest.mark.parametrize("preset", [name for name in METHODS if name not in NO_IDENTITY])
def test_a_fresh_adapter_changes_nothing(preset):
    model = methods.get_peft_model(methods.base_model(preset), methods.config_of(preset, init_weights=True)).eval()
    with torch.no_grad():
        expected = methods.base_model(preset)(input_ids=tokens()).logits
        got = model(input_ids=tokens(), **inputs_of(model)).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 if preset in IDENTITY_UP_TO_ROUNDING else 0)


@pytest.mark.parametrize("preset", METHODS)
def test_checkpointing_gives_the_same_gradients(preset):
    """Layers that are recomputed in the backward pass see the inputs of their own forward pass again."""
    gradients = []
    for checkpointing in (False, True):
        model = build(preset)
        for name in ("router_noise", "expert_dropout"):
            assert getattr(model.peft_config["default"], name) >= 0
        model.train()
        given = inputs_of(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        torch.manual_seed(1)
        loss = model(input_ids=tokens(), labels=tokens(), **given).loss
        # Another pass in between, with other inputs: the first one's layers must not see them.
        with torch.no_grad():
            model(input_ids=tokens(seed=9), **{name: value.flip(0) for name, value in given.items()})
        if preset in SAMPLES_IN_TRAINING:
            torch.manual_seed(2)
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("preset", NEEDS_INPUTS)
def test_what_routing_needs_and_was_not_given_is_named(preset):
    model = build(preset)
    what = next(iter(inputs_of(model)))
    with pytest.raises(MoloraError, match=rf"reads {what}, and none were given. Pass `{what}=`"):
        model(input_ids=tokens())
    if what == "task_ids":
        with pytest.raises(MoloraError, match=r"task_ids holds 3; this adapter knows 0 to 2 \(`num_tasks`\)"):
            model(input_ids=tokens(), task_ids=torch.tensor([0, 1, 3]))
        with pytest.raises(MoloraError, match=r"must be integers \[B\], one per row; got torch.float32"):
            model(input_ids=tokens(), task_ids=torch.tensor([0.0, 1.0, 2.0]))
        with torch.no_grad():
            given = inputs_of(model)["task_ids"]
            from_list = model(input_ids=tokens(), task_ids=given.tolist()).logits
            assert torch.equal(from_list, model(input_ids=tokens(), task_ids=given).logits)
    with pytest.raises(MoloraError, match=rf"{what} has 2 rows and the batch 3"):
        model(input_ids=tokens(), **{what: inputs_of(model)[what][:2]})


FIXED = ["lora", "lorahub", "mos", "psec", "selma", "static"]
"""Methods whose weights depend on nothing that is passed in."""


@pytest.mark.parametrize("preset", FIXED)
def test_fixed_mixtures_merge_and_become_a_plain_lora_exactly(preset, tmp_path):
    model = build(preset)
    with torch.no_grad():
        expected = model(input_ids=tokens()).logits
    rank = max(sum(layer.molora_plan["default"].ranks) for layer in layers_of(model).values())
    save_as_lora(tmp_path, model, rank=rank)
    lora = PeftModel.from_pretrained(methods.base_model(preset), tmp_path).eval()
    merged = model.merge_and_unload(safe_merge=True)
    with torch.no_grad():
        torch.testing.assert_close(lora(input_ids=tokens()).logits, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(merged(input_ids=tokens()).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("preset", [name for name in METHODS if name not in FIXED])
def test_anything_else_refuses_to_merge(preset):
    model = build(preset)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(MergeError, match="no single weight reproduces it"):
        model.merge_and_unload()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
