"""The plug-in for vLLM on a stand-in: the names and signatures it uses, what it replaces, and what it leaves alone."""

from __future__ import annotations

import ast
import copy
import importlib
import logging
import subprocess
import sys
from types import SimpleNamespace

import plugin_engine
import pytest
import torch
from plugin_engine import ATTENTION, PLUGIN, Engine, part

vllm, plugin, engine = plugin_engine.vllm, plugin_engine.plugin, plugin_engine.engine


def changed(vllm):
    """What the plug-in replaces."""
    manager = vllm["vllm.lora.model_manager"].LoRAModelManager
    worker = vllm["vllm.lora.worker_manager"].WorkerLoRAManager
    config = vllm["vllm.config.lora"].LoRAConfig
    return manager.__init__, manager.activate_adapter, worker._load_adapter, config.compute_hash


def holder_of(vllm, name):
    """The object a dotted name ends in, and the last part of the name."""
    module, _, path = name.partition(":")
    found = vllm[module]
    *way, last = path.split(".")
    for step in way:
        found = getattr(found, step)
    return found, last


def table(name):
    """A table of names, read from the file, as the plug-in itself is imported in tests only."""
    for node in ast.parse((PLUGIN / "compatibility.py").read_text()).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == name:
            return node.value.keys if isinstance(node.value, ast.Dict) else node.value.elts
    raise LookupError(name)


def signatures():
    """Names whose parameters are compared."""
    return [ast.literal_eval(key) for key in table("_USED")]


NAMES = [ast.literal_eval(name) for name in table("_NAMES")]


def test_a_vllm_with_the_same_names_and_parameters_fits(plugin):
    assert part("compatibility").differences() == []
    assert part("compatibility").is_tested()
    assert part("compatibility").version() == "0.32.0"


@pytest.mark.parametrize("name", [name for name in signatures() if not name.endswith("__init__")] + NAMES)
def test_a_missing_name_keeps_the_plug_in_off(name, vllm, plugin, caplog):
    delattr(*holder_of(vllm, name))
    stays_off(vllm, plugin, caplog, f"there is no {name.partition(':')[2]}")


@pytest.mark.parametrize("name", signatures())
def test_other_parameters_keep_the_plug_in_off(name, vllm, plugin, caplog):
    holder, last = holder_of(vllm, name)
    setattr(holder, last, lambda self, something, *, else_: None)
    stays_off(vllm, plugin, caplog, f"{name.partition(':')[2]} takes (self, something, else_) instead of (")


def stays_off(vllm, plugin, caplog, expected):
    assert any(expected in found for found in part("compatibility").differences())
    plugin.register()
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    for said in (expected, "0.32.0", "off", "Install one of these versions", "molora export DIR OUT --as lora"):
        assert said in record.getMessage()
    assert "molora_vllm.hooks" not in sys.modules
    hooked = [vllm["vllm.lora.model_manager"].LoRAModelManager, vllm["vllm.lora.worker_manager"].WorkerLoRAManager]
    functions = [function for kind in hooked for function in vars(kind).values()]
    assert not any(hasattr(function, "__wrapped__") for function in functions)


def test_every_name_of_vllm_that_is_imported_is_checked_first(plugin):
    checked = [*signatures(), *NAMES]
    for file in ("adapter.py", "hooks.py", "layer.py"):
        for node in ast.walk(ast.parse((PLUGIN / file).read_text())):
            if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] == "vllm":
                for alias in node.names:
                    name = f"{node.module}:{alias.name}" if node.module != "vllm" else f"vllm.{alias.name}:"
                    assert any(one.startswith(name) for one in checked), f"{file}: {name}"


def test_another_version_that_looks_the_same_is_used_with_a_warning(vllm, plugin, caplog):
    vllm["vllm"].__version__ = "0.99.1"
    before = changed(vllm)
    plugin.register()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "0.99.1" in record.getMessage()
    assert "molora check-serving DIR" in record.getMessage()
    assert all(new is not old for new, old in zip(changed(vllm), before, strict=True))


def test_graphs_compiled_without_the_plug_in_are_others(vllm, plugin):
    config = vllm["vllm.config.lora"].LoRAConfig()
    before = config.compute_hash()
    plugin.register()
    assert config.compute_hash() not in (before, "")
    assert config.compute_hash() == config.compute_hash()


def test_an_engine_whose_modules_cannot_be_read_goes_on(vllm, plugin, caplog, monkeypatch):
    """Plug-ins are called in every engine, with LoRAs or without; none may end for ours."""
    plain = importlib.import_module

    def broken(name):
        if name == "vllm.lora.model_manager":
            raise AttributeError("another vLLM")
        return plain(name)

    monkeypatch.setattr(part("compatibility").importlib, "import_module", broken)
    plugin.register()
    assert "there is no LoRAModelManager" in caplog.records[0].getMessage()


def test_other_devices_keep_what_they_had(vllm, plugin):
    engine = Engine(vllm, plugin, device="meta")
    assert all(layer.punica_wrapper is engine.manager.shared for layer in engine.layers.values())


def test_a_wrapper_can_be_copied(engine):
    wrapper = next(iter(engine.layers.values())).punica_wrapper
    assert copy.copy(wrapper).gates == wrapper.gates
    with pytest.raises(AttributeError):
        wrapper.__deepcopy__  # noqa: B018


def test_registering_twice_installs_once_and_says_nothing(vllm, plugin, caplog):
    plugin.register()
    once = changed(vllm)
    plugin.register()
    assert changed(vllm) == once
    assert not any(hasattr(method.__wrapped__, "__wrapped__") for method in once)
    assert not caplog.records


def test_everything_else_is_asked_of_vllms_wrapper(engine):
    wrapper = engine.layers[ATTENTION.format(0) + "o_proj"].punica_wrapper
    engine.manager.shared.something = object()
    assert wrapper.something is engine.manager.shared.something
    with pytest.raises(AttributeError):
        _ = wrapper.nothing


def test_classification_heads_keep_vllms_wrapper(vllm, plugin):
    plugin.register()
    head = vllm["vllm.lora.layers"].ClassificationHeadWithLoRA(32, [3])
    config = SimpleNamespace(config=None, linears={"score": head})
    whole = SimpleNamespace(model_config=SimpleNamespace(hf_config=None))
    manager = vllm["vllm.lora.model_manager"].LoRAModelManager(config, 1, 1, 1, None, torch.device("cpu"), whole)
    assert head.punica_wrapper is manager.shared


def test_importing_the_plug_in_imports_neither_torch_nor_molora(tmp_path):
    """In a process of its own: every process of a server imports it, mixtures or not."""
    script = tmp_path / "script.py"
    script.write_text(
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('molora_vllm', {str(PLUGIN / '__init__.py')!r})\n"
        "spec.loader.exec_module(importlib.util.module_from_spec(spec))\n"
        "print([name for name in sys.modules if name.partition('.')[0] in ('torch', 'molora', 'vllm')])\n"
    )
    found = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=True)
    assert found.stdout.strip() == "[]"


def test_molora_is_imported_when_a_mixture_is_loaded(plugin):
    """No module of the plug-in imports it at its head, nor what imports it."""
    for file in PLUGIN.glob("*.py"):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                module = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
                assert module.partition(".")[0] != "molora", file.name
