"""Every fenced block of the pages written by hand runs, or stands in the table below with the reason why not.

molora's commands run on a tiny model, each in a folder of its own that has what the pages name. Python runs there too,
and YAML is trained on for a step. Of commands of other programs the targets, extras, files and options are looked up.
"""

from __future__ import annotations

import ast
import io
import json
import os
import re
import shlex
import shutil
from pathlib import Path

import doc_blocks
import foreign
import pytest
import tiny
import torch
import yaml
from doc_blocks import ROOT, blocks_of, commands_of, is_whole, yaml_of
from loras import save_lora
from methods import MOE_MODELS
from peft import get_peft_model
from test_import_xlora import save_xlora

import molora_cli
import molora_cli.arguments
from molora import MoLoraConfig
from molora.base import CONVERSION, PACKAGED
from molora.errors import ConfigError, TargetModulesError
from molora.runfile import load_run_file

PAGES = doc_blocks.pages_by_hand()
COMMANDS, SHOWN = ("", "bash", "sh"), ("text", "mermaid")
LANGUAGES = (*COMMANDS, *SHOWN, "python", "yaml")

VLLM = "needs vLLM: `make serve-test`"
PROCESSES = "starts several processes: tests/test_processes_launch.py"
NOT_RUN = {
    ("README.md", "molora serve"): VLLM,
    ("README.md", "molora check-serving"): VLLM,
    ("docs/serving.md", "molora serve"): VLLM,
    ("docs/serving.md", "molora check-serving"): VLLM,
    ("docs/serving.md", "from vllm import"): VLLM,
    ("docs/evaluation.md", "molora eval runs/support --tasks"): "needs lm-evaluation-harness: `make test-eval`",
    ("README.md", "molora train run.yaml --num_processes"): PROCESSES,
    ("docs/many_processes.md", "molora train run.yaml --num_processes"): PROCESSES,
    ("README.md", "molora train run.yaml --load_in_4bit"): "needs bitsandbytes: `make test-quantization`",
    ("README.md", "molora export runs/quickstart gguf"): "needs the base's GGUF file: tests/test_export_gguf_files.py",
}
"""Page and beginning of a command or of a block of Python: read and parsed, but not run, and why."""

FORMULAS = {
    ("README.md", "y = W0 x"): "a formula",
    ("README.md", "task  "): "scores of one run of `make quickstart`",
}
"""Plain blocks that hold no commands: page and beginning. Elsewhere they are marked as `text`."""

STORY = "docs/quickstart.md"
"""The page whose blocks run one after the other in one folder, as a reader does it."""
STORYS_ROWS = {"max_samples": 10, "eval_max_samples": 2}

TOGETHER = ("docs/routers.md", STORY)
"""Pages whose blocks of Python go on with the names of the one before."""

MEANT = {"FILE": "run.yaml", "RUN": "runs/quickstart", "[FILE]": "new.yaml", "[--key": "--max_steps", "value]": "1"}
"""What words that stand for something are in a command that is run; `DIR` is the mixture of `runs/quickstart`."""

IN_COMMANDS = {
    "molora compose OUT --adapter DIR": {"DIR": "loras/sums"},
    "molora import DIR OUT": {"DIR": "loras/sums"},
    "molora export DIR OUT --as lora": {"DIR": "runs/static"},
    "molora merge DIR OUT": {"DIR": "runs/static"},
    "molora export DIR OUT --as lora --task sentiment": {"DIR": "runs/tasks"},
    "molora eval DIR --data FILE": {"FILE": "data.jsonl"},
    "molora compare runs/lora runs/mixture": {"runs/lora": "runs/first", "runs/mixture": "runs/support"},
}
"""What they are in single commands, such as those about other adapters than one that routes every token."""

MIXTURE = {
    "model_name_or_path": PACKAGED,
    "preset": "mole",
    "num_experts": 6,
    "r": 4,
    "target_modules": ["q_proj", "v_proj"],
    "datasets": [
        {"path": f"data/{task}.jsonl", "eval_path": f"data/{task}.jsonl", "eval_max_samples": 2, "task": task}
        for task in ("sentiment", "arithmetic")
    ],
    "output_dir": "runs/new",
    "max_steps": 2,
    "max_length": 96,
    "per_device_train_batch_size": 2,
    "bf16": False,
    "eval_max_new_tokens": 2,
    "disable_tqdm": True,
}
"""The run file `run.yaml`, and what keys of a fragment are put into."""


def write_rows(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"prompt": f"{index} and 1", "completion": f"{index + 1}"} for index in range(10)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def molora(*words):
    assert molora_cli.main(list(words)) == 0, words


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny model that every test finds as the packaged one."""
    cache = tmp_path_factory.mktemp("cache")
    folder = cache / f"{PACKAGED}-v{CONVERSION}"
    tiny.tiny_llama().save_pretrained(folder)
    tiny.tiny_tokenizer().save_pretrained(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOLORA_CACHE", str(cache))
        yield folder


@pytest.fixture(scope="module")
def workspace(base, tmp_path_factory):
    """A folder with all that pages name: mixtures, LoRAs, adapters of other libraries, rows and a run file."""
    folder = tmp_path_factory.mktemp("workspace")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("data/sentiment", "data/arithmetic", "data", "new", "examples"):
            write_rows(Path(f"{name}.jsonl"))
        Path("run.yaml").write_text(yaml.safe_dump(MIXTURE, sort_keys=False))
        Path("BASE").symlink_to(base)
        made = ["--save_strategy", "steps", "--save_steps", "1", "--logging_steps", "1", "--output_dir"]
        molora("train", "run.yaml", *made, "runs/quickstart")
        few = ["--evaluate_tasks", "false", "--output_dir"]
        molora("train", "run.yaml", "--preset", "moelora", "--num_experts", "2", *few, "runs/tasks")
        molora("train", "run.yaml", "--preset", "static", *few, "runs/static")
        shutil.copytree("runs/quickstart/checkpoint-2", "runs/quickstart/checkpoint-200")
        for name in ("runs/support", "runs/first", "DIR"):
            Path(name).symlink_to(folder / "runs/quickstart")
        model = tiny.tiny_llama()
        model.name_or_path = str(base)
        for seed, name in enumerate(("sums", "dates", "math", "code")):
            save_lora(Path("loras") / name, seed, model, r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
            model = get_base(model)
        for name in ("lora-folder", "lora-a", "lora-b", "a", "b", "c"):
            shutil.copytree("loras/sums", name)
        tensors = foreign.random_tensors(tiny.tiny_llama(), foreign.MIXLORA)
        foreign.save_moe(Path("mixlora-folder"), foreign.MIXLORA, tensors)
        save_xlora(Path("xlora-folder"), {name: Path("loras") / name for name in ("math", "code")})
    return folder


def get_base(model):
    """The same base model anew, as PEFT's modules stay in one that was adapted."""
    fresh = tiny.tiny_llama()
    fresh.name_or_path = model.name_or_path
    return fresh


@pytest.fixture
def enter(workspace, tmp_path, monkeypatch):
    """A function that goes into a new folder which has all of the workspace; what is written stays in it."""

    def go(name):
        folder = tmp_path / name
        for inner in ("runs", "loras"):
            (folder / inner).mkdir(parents=True)
        for path in [*workspace.iterdir(), *(workspace / "runs").iterdir(), *(workspace / "loras").iterdir()]:
            here = folder / path.relative_to(workspace)
            if not here.exists():
                here.symlink_to(path)
        monkeypatch.chdir(folder)

    return go


@pytest.fixture
def names(base):
    """What a block of Python may take for granted: `model`, `tokenizer`, `input_ids` and `batches`."""

    def make():
        model, tokenizer = tiny.tiny_llama(), tiny.tiny_tokenizer()
        model.name_or_path = str(base)
        input_ids = tokenizer(["one", "two", "six"], return_tensors="pt").input_ids
        batches = [{"input_ids": ids, "labels": ids} for ids in torch.randint(10, 90, (4, 3, 8))]
        return {"__name__": "example", "model": model, "tokenizer": tokenizer} | {
            "input_ids": input_ids,
            "batches": batches,
        }

    return make


def reason(page, text):
    """Why a command or block is not run, or None."""
    return next((why for (where, start), why in NOT_RUN.items() if where == page and text.startswith(start)), None)


def is_shown(block):
    return any(block.page == page and block.text.startswith(start) for page, start in FORMULAS)


def commands(page):
    """The commands of a page, as printed."""
    blocks = [block for block in blocks_of(page, *COMMANDS) if not is_shown(block)]
    return [words for block in blocks for words in commands_of(block.text)]


def is_molora(words):
    return Path(words[0]).name == "molora"


def run(words, monkeypatch):
    """Run a command of molora as printed, with what its placeholders stand for."""
    meant = MEANT | IN_COMMANDS.get(" ".join(words), {})
    words = [meant.get(word, word) for word in words[1:]]
    words += ["--max-new-tokens", "8"] if words[0] == "chat" else []
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n/quit\n"))
    # Drawn by tests/test_report_command.py; a second for each report here.
    monkeypatch.setattr("molora.commands.report.available", lambda: False)
    molora(*words)


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_in_a_language_that_is_checked(page):
    assert not [f"{block}: {block.language}" for block in blocks_of(page) if block.language not in LANGUAGES]


def test_the_tables_hold_nothing_stale():
    printed = {(page, " ".join(words)) for page in PAGES for words in commands(page)}
    python = {(page, block.text) for page in PAGES for block in blocks_of(page, "python")}
    for page, start in NOT_RUN:
        assert any(where == page and text.startswith(start) for where, text in printed | python), (page, start)
    for page, start in FORMULAS:
        assert any(block.text.startswith(start) for block in blocks_of(page, "")), (page, start)
    assert {text for _, text in printed} >= set(IN_COMMANDS)
    assert {page for page in PAGES if len(blocks_of(page, "python")) > 1} >= set(TOGETHER)


@pytest.mark.parametrize("page", PAGES)
def test_what_is_only_shown_holds_no_commands(page):
    for block in blocks_of(page, "text"):
        assert not [line for line in block.text.splitlines() if line.startswith(("molora ", "make ", "pip ", "$"))]
    for block in blocks_of(page, "mermaid"):
        doc_blocks.check_drawing(block.text)


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)])
def test_commands_that_are_printed_are_commands(page):
    for words in commands(page):
        if is_molora(words):
            molora_cli.arguments.parse([MEANT.get(word, word) for word in words[1:]])
        else:
            doc_blocks.check_command(words)


def to_run(page):
    return [words for words in commands(page) if is_molora(words) and not reason(page, " ".join(words))]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", [page for page in PAGES if to_run(page) and page != STORY])
def test_moloras_commands_run_as_printed(page, enter, monkeypatch):
    for number, words in enumerate(to_run(page)):
        enter(str(number))
        run(words, monkeypatch)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks_of(page, "python") and page != STORY])
def test_python_runs_as_printed(page, enter, names):
    enter("here")
    given = names()
    for block in blocks_of(page, "python"):
        code = compile(ast.parse(block.text), str(block), "exec")
        if not reason(page, block.text):
            given = given if page in TOGETHER else names()
            exec(code, given)


SHORT = {"max_steps": 1, "max_length": 96, "eval_max_new_tokens": 2, "per_device_train_batch_size": 2}
FEW = {"max_samples": 6, "eval_max_samples": 2}


def base_for(content, folder):
    """A base model that has what the keys are about."""
    kind = "olmoe" if content.get("preset") == "perft" else "qwen2-moe" if "ffn_modules" in content else None
    if kind is None:
        return PACKAGED
    MOE_MODELS[kind]().save_pretrained(folder / kind)
    tiny.tiny_tokenizer().save_pretrained(folder / kind)
    return f"./{kind}"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks_of(page, "yaml") and page != STORY])
def test_yaml_is_planned_and_trained_on(page, enter, tmp_path):
    """What names a base model is a run file as it stands, also with its own data; the rest is put into one."""
    for number, block in enumerate(blocks_of(page, "yaml")):
        enter(str(number))
        content = yaml_of(block)
        text = block.text if is_whole(content) else yaml.safe_dump(MIXTURE | content, sort_keys=False)
        Path("page.yaml").write_text(text, encoding="utf-8")
        short = SHORT | {"model_name_or_path": base_for(content, Path()), "bf16": False, "disable_tqdm": True}
        for index, dataset in enumerate(yaml.safe_load(text)["datasets"]):
            short |= {f"datasets.{index}.{key}": value for key, value in FEW.items()}
            for path in (dataset["path"], dataset["eval_path"]):
                assert os.path.lexists(ROOT / path) or not path.startswith("examples/"), path
                if not Path(path).exists():
                    write_rows(Path(path))
        words = [f"{key}={json.dumps(value)}" for key, value in short.items()]
        if is_whole(content):
            molora("plan", "page.yaml", *words)
        molora("train", "page.yaml", *words, "output_dir=out")
        assert Path("out/adapter_model.safetensors").is_file()


def spaced(text):
    """Words with one space between them, without the lines of tables, and one name for all numbers."""
    words = " ".join(re.sub(r"[━┃┏┓┡┩┳╇│└┘┴─┌┐┬]", " ", text).split())
    return re.sub(r"[+-]?\d[\d,.]*(e[+-]\d+)?%?", "0", words)


def promised(block):
    """The lines of shown output that a command must print whatever the model: the first, and those of tables."""
    first, *others = block.text.splitlines()
    return {spaced(line) for line in [first, *(line for line in others if line.startswith((" ", "│", "┃")))]}


@pytest.mark.filterwarnings("ignore")
def test_the_quickstart_runs_from_its_first_line_to_its_last(base, tmp_path, monkeypatch, capsys):
    """Blocks run in their order, and what is shown of a command's output is what it prints, but for the numbers."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    given, said = {"__name__": "example"}, ""
    keys = {"max_steps": 5, "eval_max_new_tokens": 2, "per_device_train_batch_size": 2}
    keys |= {f"datasets.{index}.{key}": count for index in (0, 1) for key, count in STORYS_ROWS.items()}
    short = [f"{key}={value}" for key, value in keys.items()]
    for block in blocks_of(STORY):
        if block.language == "text":
            missing = promised(block) - {spaced(line) for line in said.splitlines()}
            assert not missing, f"{block} is not printed: {missing}"
            continue
        if block.language == "yaml":
            name = re.match(r"# (\S+\.yaml)\n", block.text)[1]
            assert Path(name).is_file(), "the page tells how to make it"
            Path(name).write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            exec(compile(block.text, str(block), "exec"), given)
        for words in commands_of(block.text) if block.language in COMMANDS else []:
            if is_molora(words):
                run([*words, *(short if words[1] in ("plan", "train") else [])], monkeypatch)
        said = capsys.readouterr().out
    assert Path("report/report.html").is_file()


MISTAKEN = """\
model_name_or_path: smollm2-135m-instruct
preset: mole
num_expert: 4
lora_r: 8
selection: topk
target_modules: all-linear
learning_rate: "1e-3"
datasets:
  - path: rows.jsonl
    weigth: 2.0
"""


def test_the_mistakes_in_troubleshooting_are_printed_like_that(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(MISTAKEN)
    write_rows(Path("rows.jsonl"))
    with pytest.raises(ConfigError) as caught:
        load_run_file("run.yaml")
    (shown,) = blocks_of("docs/troubleshooting.md", "text")
    for line, printed in zip(shown.text.splitlines(), str(caught.value).splitlines(), strict=True):
        assert all(part in printed for part in line.split("…")), printed


def test_the_refusal_in_moe_models_is_printed_like_that():
    config = MoLoraConfig.from_preset("mole", target_modules=["experts"], task_type="CAUSAL_LM")
    with pytest.raises(TargetModulesError) as caught:
        get_peft_model(MOE_MODELS["mixtral"](), config)
    (shown,) = blocks_of("docs/moe_models.md", "text")
    assert " ".join(shown.text.removesuffix("…\n").split()) in " ".join(str(caught.value).split())


def test_the_method_in_add_a_method_is_one(names):
    example, given = blocks_of("docs/add_a_method.md", "python")[0], {}
    exec(compile(example.text, str(example), "exec"), given)
    model = get_peft_model(tiny.tiny_llama(), MoLoraConfig(**given["my_method"](), target_modules=["q_proj"]))
    ids = names()["input_ids"]
    assert torch.isfinite(model(input_ids=ids, labels=ids).loss)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("make qickstart", "no target 'qickstart'"),
        ('make test ARGS="-m fast"', "markers"),
        ("make test OPTIONS=1", "reads no OPTIONS"),
        ("pip install 'molora[vlm]'", "extras are"),
        ("pip install torch==1.0", "pinned otherwise"),
        ("pip install leftpad", "no.* package leftpad"),
        ("pip install -r requirements.txt", ""),
        ("curl -d '{1}' http://127.0.0.1:8000/v1/models", ""),
        ("python docs/generate.py --chek", "--chek"),
        ("python examples/missing.py", "missing.py"),
        ("python -m benchmarks.quality --taks x", ""),
        ("python -m pytest tests/test_missing.py", ""),
        ("python -m http.server", "no check"),
        ("rm -rf runs", "no program"),
    ],
)
def test_a_command_that_cannot_work_is_noticed(words, said):
    with pytest.raises((AssertionError, SystemExit, ValueError, ModuleNotFoundError), match=said or None):
        doc_blocks.check_command(shlex.split(words))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("molora a  # don't\n\nmolora b \\\n  --c d\n", [["molora", "a"], ["molora", "b", "--c", "d"]]),
        ('molora a "x\ny"\n', [["molora", "a", "x\ny"]]),
        ("molora a | b   # two\n", [["molora", "a"], ["molora", "b"]]),
    ],
)
def test_commands_are_read_with_what_they_go_on_in(text, expected):
    assert commands_of(text) == expected


def test_blocks_are_found_with_their_line_and_language():
    text = "a\n```yaml\nb: 1\n```\n- c\n\n  ~~~\n  ```\n    d\n  ~~~\n"
    found = [(block.line, block.language, block.text) for block in doc_blocks.read_blocks("p", text)]
    assert found == [(2, "yaml", "b: 1\n"), (7, "", "```\n  d\n")]
    with pytest.raises(ValueError, match="p:1: the block has no end"):
        list(doc_blocks.read_blocks("p", "```yaml\na: 1\n"))
