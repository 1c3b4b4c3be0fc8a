"""Pages that follow from the code are fresh; links lead somewhere; what pages print runs, parses and is true."""

from __future__ import annotations

import ast
import importlib
import re
import sys
from pathlib import Path

import pytest
import tiny
import torch
import transformers
import yaml
from loras import save_lora
from methods import MOE, MOE_MODELS
from peft import get_peft_model

import molora_cli.arguments
from molora import MoLoraConfig, available_presets
from molora.bank import MoLoraLayer
from molora.compose import compose
from molora.errors import TargetModulesError
from molora.runfile import keys, load_run_file

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in DOCS.rglob("*.md"))
WRITTEN = [
    *("docs/README.md", "docs/concepts.md", "docs/choosing.md", "docs/migration.md", "docs/troubleshooting.md"),
    *("docs/trainers.md", "docs/moe_models.md", "docs/add_a_method.md"),
]
"""Pages by hand whose blocks are tested here; those of the others are in test_docs.py."""
OF_METHODS = [f"docs/methods/{name}.md" for name in available_presets()]


def text_of(page):
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text_of(page), re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def generate():
    """The command docs/generate.py, as a module."""
    sys.path.insert(0, str(DOCS))
    try:
        yield importlib.import_module("generate")
    finally:
        sys.path.remove(str(DOCS))


def test_generated_pages_are_as_the_code_is(generate):
    pages = generate.generated()
    assert generate.stale(pages) == [], "run `python docs/generate.py`"
    assert {f"docs/{path}" for path in pages} >= {*OF_METHODS, "docs/reference/cli.md", "docs/reference/config.md"}


def test_a_stale_missing_or_left_over_page_is_noticed_and_put_right(generate, tmp_path):
    pages = {"methods/a.md": generate.MARK + "\nnew\n", "methods/b.md": generate.MARK + "\n", "c.md": generate.MARK}
    (tmp_path / "methods").mkdir()
    for name, text in {"a": "\nold\n", "gone": "\n"}.items():
        (tmp_path / f"methods/{name}.md").write_text(generate.MARK + text)
    (tmp_path / "by_hand.md").write_text("# Mine\n")
    (tmp_path / "c.md").write_text(generate.MARK)
    old = generate.stale(pages, tmp_path)
    assert old == ["methods/a.md", "methods/b.md", "methods/gone.md"]
    for path in old:
        generate.write(path, pages.get(path), tmp_path)
    assert generate.stale(pages, tmp_path) == []
    assert sorted(path.name for path in tmp_path.rglob("*.md")) == ["a.md", "b.md", "by_hand.md", "c.md"]


@pytest.mark.parametrize("text", ["# New\n", None])
def test_a_page_by_hand_is_never_overwritten(text, generate, tmp_path):
    (tmp_path / "a.md").write_text("# Mine\n")
    with pytest.raises(FileExistsError, match="by hand"):
        generate.write("a.md", text, tmp_path)
    assert (tmp_path / "a.md").read_text() == "# Mine\n"


def test_the_command_says_what_is_stale(generate, monkeypatch, capsys):
    monkeypatch.setattr(generate, "generated", lambda: {"methods/lora.md": "another text"})
    monkeypatch.setattr(sys, "argv", ["generate.py", "--check"])
    before = text_of("docs/methods/lora.md")
    assert generate.main() == 1
    assert "stale: docs/methods/lora.md" in capsys.readouterr().out
    assert text_of("docs/methods/lora.md") == before


def test_every_preset_has_its_use():
    assert sorted(yaml.safe_load((DOCS / "when_to_use.yaml").read_text(encoding="utf-8"))) == available_presets()


def anchors(page):
    """What may follow `#` in a link to a page, as GitHub makes it from headings."""
    found: dict[str, int] = {}
    result = set()
    for title in re.findall(r"^#{1,6} (.*)$", re.sub(r"^```.*?^```", "", text_of(page), flags=re.S | re.M), re.M):
        plain = re.sub(r"\[(.*?)\]\(.*?\)", r"\1", title)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).strip().replace(" ", "-")
        number = found.get(slug, 0)
        found[slug] = number + 1
        result.add(f"{slug}-{number}" if number else slug)
    return result


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "benchmarks/README.md", *PAGES])
def test_every_link_leads_somewhere(page):
    prose = re.sub(r"^```.*?^```", "", text_of(page), flags=re.S | re.M)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"https?://|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        file = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert file.exists(), target
        assert file.is_relative_to(ROOT), target
        if anchor:
            assert anchor in anchors(file.relative_to(ROOT)), target


def test_every_page_is_in_the_index():
    index = text_of("docs/README.md")
    pages = [path.name for path in DOCS.glob("*.md") if path.name != "README.md"]
    assert [name for name in pages if f"({name})" not in index] == []


@pytest.mark.parametrize("page", OF_METHODS)
def test_yaml_is_a_run_file_or_part_of_one(page, tmp_path):
    """What names a base model is a whole run file, and loads; the rest is fields of an adapter, which go together."""
    folder = tmp_path / "configs" / "methods"
    folder.mkdir(parents=True)
    for name in (tmp_path, folder):
        (name / "examples").symlink_to(ROOT / "examples")
    for number, block in enumerate(blocks(page, "yaml")):
        content = yaml.safe_load(block)
        if "model_name_or_path" in content:
            file = folder / f"{number}.yaml"
            file.write_text(block, encoding="utf-8")
            assert load_run_file(file).datasets
            continue
        known = keys.top_level_keys()
        assert all(known[key].group == keys.ADAPTER for key in content)
        assert MoLoraConfig.from_preset(content.pop("preset"), **content)


@pytest.mark.parametrize("page", OF_METHODS)
def test_commands_that_are_printed_are_commands(page):
    lines = "\n".join(blocks(page, "")).replace("\\\n", " ").splitlines()
    for line in lines:
        if line.startswith("molora "):
            molora_cli.arguments.parse(line.split("#")[0].replace("…", "").split()[1:])


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """A folder with trained LoRAs and with gates for them."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("sums", "dates")):
        save_lora(folder / "loras" / name, seed, r=2, target_modules=["q_proj"])
        gate = compose(tiny.tiny_llama(), [str(folder / "loras" / name)], preset="phatgoose-gate")
        gate.save_pretrained(folder / "gates" / name)
    return folder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", OF_METHODS)
def test_the_example_of_a_method_makes_it(page, adapters, monkeypatch):
    monkeypatch.chdir(adapters)
    (example,) = blocks(page, "python")
    made = {"model": tiny.tiny_llama()}
    exec(example, made)
    layers = [module for module in made["model"].modules() if isinstance(module, MoLoraLayer)]
    expected = MoLoraConfig.from_preset(Path(page).stem)
    assert layers
    assert made["model"].peft_config["default"].router == expected.router


def test_messages_that_are_explained_are_those_of_the_code():
    """Each stands in bold; what changes from case to case is written as three dots."""
    literals = set()
    for folder in ("molora", "trainers", "cli"):
        for file in (ROOT / folder).rglob("*.py"):
            tree = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
            literals |= {node.value for node in tree if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    said = "\n".join(literals)
    headings = re.findall(r"^\*\*(`.*?)\*\*", text_of("docs/troubleshooting.md"), re.MULTILINE)
    messages = [message for heading in headings for message in re.findall(r"`(.*?)`", heading)]
    assert len(messages) > 20
    for message in messages:
        parts = [part.strip(" ;,.") for part in message.split("...")]
        assert "KeyError" in message or all(part in said for part in parts), message


def _more_moe_models():
    few = {**MOE, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    qwen = {**few, "num_experts": 4, "head_dim": 8}
    heads = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    groups = {"n_group": 1, "topk_group": 1, "n_routed_experts": 4, "first_k_dense_replace": 1}
    deepseek = {**few, **heads, **groups, "num_key_value_heads": 4}
    return {
        "qwen3-moe": lambda: transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**qwen)),
        "deepseek-v3": lambda: transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**deepseek)),
        "gpt-oss": lambda: transformers.GptOssForCausalLM(
            transformers.GptOssConfig(**MOE, num_local_experts=4, num_experts_per_tok=2, head_dim=8)
        ),
    }


ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
DENSE = {"gate_proj", "up_proj", "down_proj"}
LATENT = {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}
ADAPTED = {
    "mixtral": ATTENTION,
    "olmoe": ATTENTION,
    "qwen3-moe": ATTENTION,
    "gpt-oss": ATTENTION,
    "qwen2-moe": ATTENTION | DENSE | {"shared_expert_gate"},
    "deepseek-v3": LATENT | DENSE,
}
"""What moe_models.md says that `all-linear` adapts."""


def adapted(model, preset, **fields):
    """Last names of the adapted modules, after a forward and a backward pass that reached all of them."""
    config = MoLoraConfig.from_preset(preset, init_weights=False, task_type="CAUSAL_LM", **fields)
    model = get_peft_model(model, config)
    ids = torch.arange(10, 22).reshape(2, 6)
    model(input_ids=ids, labels=ids).loss.backward()
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MoLoraLayer)}
    assert all(layer.molora_B["default"].weight.grad is not None for layer in layers.values())
    return {name.rsplit(".", 1)[-1] for name in layers}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ADAPTED)
def test_models_with_experts_are_adapted_where_the_page_says(kind):
    make = {**MOE_MODELS, **_more_moe_models()}[kind]
    assert adapted(make(), "mole", target_modules="all-linear") == ADAPTED[kind]
    assert adapted(make(), "perft") == {"mlp"}


@pytest.mark.filterwarnings("ignore")
def test_mixlora_goes_on_the_shared_expert_as_the_page_says():
    example = next(
        block for block in map(yaml.safe_load, blocks("docs/moe_models.md", "yaml")) if "ffn_modules" in block
    )
    assert adapted(MOE_MODELS["qwen2-moe"](), **example) == ATTENTION | DENSE
    with pytest.raises(TargetModulesError, match=r"such as \[shared_expert\]"):
        adapted(MOE_MODELS["qwen2-moe"](), "mixlora", target_modules="all-linear")
