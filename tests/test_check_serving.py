"""`molora check-serving`: what counts as the same answer, and asking servers, which are played here."""

import json
import math
import re
import threading
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import tiny
import torch
from loras import save_lora
from peft import get_peft_model

import molora_cli
from molora import MoLoraConfig
from molora.commands import check_serving
from molora.errors import MoloraError
from molora.serving.answers import PROMPTS, Reference, prompt_ids
from molora.serving.comparison import Answer, Scores, effect, judge
from molora.serving.engines import GROUPS, Job, ask_server, server_models

END = 3
NEW = 6


@pytest.mark.parametrize(
    ("tokens", "served", "read", "best", "same", "says"),
    [
        ([5, 6, 7], [-1, -2, -3], [-1, -2, -3], [-1, -2, -3], 3, None),
        ([5, 6, 7], [-1, -2, -3], [-1.009, -2, -3], [-1, -2, -3], 2, None),
        ([5, 6, 7], [-1, -2, -3], [-1, -2, -3], [-1, -1.991, -3], 2, None),
        ([5, 6, 7], [-1, -2, -3], [-1, -2, -3], [-1, -1.5, -3], 2, r"token 2 \(id 6\) is not what PyTorch"),
        (
            [5, 6, 7],
            [-1, -2, -3],
            [-1, -2, -3.02],
            [-1, -2, -3.02],
            3,
            r"token 3 \(id 7\): its log-probability is off",
        ),
        ([5, 6, 7], [-1, math.nan, -3], [-1, -2, -3], [-1, -2, -3], 3, "token 2"),
        ([5, 6, 7], [-1, -2, -3], [-1, math.nan, -3], [-1, -2, -3], 2, "token 2"),
        ([5, END], [-1, -2], [-1, -2], [-1, -2], 2, None),
        ([5, 6], [-1, -2], [-1, -2], [-1, -2], 2, "stops after 2 of 3 tokens, and not at an end"),
        ([5, 6, 7, 8], [-1] * 4, [-1] * 4, [-1] * 4, 4, "4 tokens came back, and 3"),
        ([5, 6, 7], [-1, -2], [-1, -2, -3], [-1, -2, -3], 3, "3 tokens came with 2"),
        ([], [], [], [], 0, "no token"),
    ],
    ids=[
        "equal",
        "rounded",
        "near tie",
        "wrong token",
        "wrong logprob",
        "nan served",
        "nan read",
        "ends early",
        "cut off",
        "too long",
        "lengths",
        "empty",
    ],
)
def test_an_answer_is_right_if_pytorch_finds_each_token_as_probable(tokens, served, read, best, same, says):
    verdict = judge(Answer(tokens, served), Scores(read, best), 0.01, 3, {END})
    assert (verdict.tokens, verdict.same) == (len(tokens), same)
    if says is None:
        assert verdict.reason is None
    else:
        assert verdict.reason is not None
        assert re.search(says, verdict.reason), verdict.reason


def test_a_nan_is_seen_among_the_differences():
    assert math.isnan(judge(Answer([5, 6], [-1, math.nan]), Scores([-1, -2], [-1, -2]), 1, 2, ()).worst)
    assert judge(Answer([5, 6], [-1, -2]), Scores([-1.5, -2.25], [-1, -2]), 1, 2, ()).worst == 0.5


def test_the_effect_of_an_adapter_is_the_largest_move():
    assert effect([Scores([-1, -2], ()), Scores([-3], ())], [Scores([-1, -2.5], ()), Scores([-2], ())]) == 1
    assert effect([Scores([-1], ())], [Scores([-1], ())]) == 0


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A base model and adapters on it: a mixture, another with other routers, a plain LoRA, one that is zero."""
    root = tmp_path_factory.mktemp("checking")
    tiny.tiny_llama().save_pretrained(root / "base")
    tiny.tiny_tokenizer().save_pretrained(root / "base")
    for name in ("mix", "other"):
        fields = {"num_experts": 4, "r": 3, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
        torch.manual_seed(0)
        model = get_peft_model(tiny.tiny_llama(), MoLoraConfig.from_preset("mole", init_weights=False, **fields))
        for key, parameter in model.named_parameters():
            if "router" in key and name == "other":
                parameter.data.neg_()
        model.peft_config["default"].base_model_name_or_path = str(root / "base")
        model.save_pretrained(root / name)
    save_lora(root / "plain", r=4, target_modules=["q_proj", "down_proj"])
    model = tiny.tiny_llama()
    zero = get_peft_model(model, MoLoraConfig.from_preset("mole", num_experts=2, r=2, target_modules=["q_proj"]))
    zero.save_pretrained(root / "zero")
    for name in ("plain", "zero"):
        path = root / name / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(root / "base")}))
    return root


@cache
def player(folder, base):
    return Player(folder, base)


class Player:
    """A server as it should be: decodes greedily, token by token, without what `Reference` does."""

    def __init__(self, folder: Path, base: Path):
        self.reference = Reference(str(folder), str(base), torch.float32)
        self.model = self.reference.model

    @torch.no_grad()
    def answers(self, prompts, count, adapted):
        return [self._answer(ids, count, adapted) for ids in prompts]

    def _answer(self, ids, count, adapted):
        tokens, logprobs = [], []
        while len(tokens) < count and END not in tokens:
            given = torch.tensor([[*ids, *tokens]])
            if adapted:
                logits = self.model(input_ids=given).logits[0, -1]
            else:
                with self.model.disable_adapter():
                    logits = self.model(input_ids=given).logits[0, -1]
            found = logits.log_softmax(-1)
            tokens.append(int(found.argmax()))
            logprobs.append(float(found.max()))
        return Answer(tokens, logprobs)

    def served(self, job):
        kinds = {group: group.endswith("adapter") for group in GROUPS}
        return {group: self.answers(job.prompts, job.max_new_tokens, adapted) for group, adapted in kinds.items()}


@pytest.fixture
def play(work, monkeypatch):
    """Let an adapter's folder be what the engine serves, and ask for another; returns exit code and job."""
    jobs = []

    def check(asked, serves, *words, change=lambda served: served):
        def ask(job, environment):
            jobs.append(job)
            return change(player(work / serves, work / "base").served(job))

        monkeypatch.setattr(check_serving, "check_vllm", lambda needs_plugin: None)
        monkeypatch.setattr(check_serving, "ask_engine", ask)
        words = ("--max-new-tokens", str(NEW), "--prompt", "2+3?", "--prompt", "hello", *words)
        return molora_cli.main(["check-serving", str(work / asked), *words]), jobs[-1]

    return check


@pytest.mark.parametrize("adapter", ["mix", "plain"])
def test_right_answers_are_a_yes(adapter, play, capsys):
    code, job = play(adapter, adapter)
    printed = capsys.readouterr().out
    assert code == 0
    assert "yes: vLLM answers as PyTorch does." in printed
    assert "changes nothing" not in printed
    assert "wrong" not in printed
    assert job.dtype == "float32"
    assert job.max_lora_rank == {"mix": 16, "plain": 8}[adapter]


def without_the_adapter(served):
    return {**served, "mixed_adapter": served["base"]}


def one_base_answer_from_the_adapter(served):
    return {**served, "mixed_base": [*served["mixed_base"][:1], served["adapter"][1]]}


def ends_too_soon(served):
    return {**served, "base": [Answer(one.tokens[:2], one.logprobs[:2]) for one in served["base"]]}


@pytest.mark.parametrize(
    ("serves", "change", "where"),
    [
        ("other", lambda served: served, "adapter, alone"),
        ("mix", without_the_adapter, "adapter, in one batch"),
        ("mix", one_base_answer_from_the_adapter, "base, in one batch, 'hello'"),
        ("mix", ends_too_soon, "base, alone, '2+3?': the answer stops after 2 of 6"),
    ],
    ids=["wrong routing", "no adapter", "adapter on the base", "cut off"],
)
def test_wrong_answers_are_a_no_that_says_where(serves, change, where, play, capsys):
    assert play("mix", serves, change=change)[0] == 1
    printed = capsys.readouterr().out
    assert "no: vLLM does not answer as PyTorch does." in printed
    assert where in printed


def test_a_tolerance_that_is_given_decides(play, capsys):
    assert play("mix", "other", "--tolerance", "1e9")[0] == 0
    assert "up to 1e+09 is rounding" in capsys.readouterr().out


def test_an_adapter_that_changes_nothing_is_told_apart_from_a_proof(play, capsys):
    assert play("zero", "zero")[0] == 0
    assert "the adapter changes nothing, so this proves little. Ask" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nowhere"], "is no folder"),
        (["base"], "holds a model, not an adapter"),
        (["mix", "--url", "127.0.0.1:1"], "give one such as http://"),
        (["mix", "--url", "http://127.0.0.1:1"], "cannot be asked"),
        (["mix", "--url", "http://127.0.0.1:1", "--prompt", " "], "--prompt: is empty"),
    ],
    ids=str,
)
def test_what_cannot_be_checked_is_neither_yes_nor_no(words, says, work, capsys):
    folder, *options = words
    assert molora_cli.main(["check-serving", str(work / folder), *options]) == 2
    printed = capsys.readouterr()
    assert says in printed.err
    assert printed.out == ""


def test_prompts_are_put_through_the_chat_template_of_the_adapter(work, tmp_path):
    tokenizer = tiny.tiny_tokenizer()
    ids = prompt_ids(str(work / "mix"), str(work / "base"), ["hi"])
    assert tokenizer.decode(ids[0]) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    tiny.tiny_tokenizer(chat_template=False).save_pretrained(tmp_path)
    assert prompt_ids(str(tmp_path), str(work / "base"), ["hi"]) == [tokenizer("hi")["input_ids"]]
    assert len({prompt.split(maxsplit=3)[2] for prompt in PROMPTS}) == len(PROMPTS), "of different kinds"


@pytest.fixture
def server(work):
    """An OpenAI-compatible server over HTTP that serves the mixture as `tuned`; its address, and what it was asked."""
    mixture, asked, lock = player(work / "mix", work / "base"), [], threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            models = [{"id": "base", "root": "x"}, {"id": "tuned", "root": str(work / "mix"), "parent": "base"}]
            self.reply({"data": models})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if body["model"] not in ("base", "tuned"):
                self.reply({"error": "no such model"}, 404)
                return
            with lock:
                asked.append(body)
                answers = mixture.answers(body["prompt"], body["max_tokens"], body["model"] == "tuned")
            choices = [
                {"index": place, "token_ids": one.tokens, "logprobs": {"token_logprobs": one.logprobs}}
                for place, one in enumerate(answers)
            ]
            self.reply({"choices": choices[::-1]})

        def reply(self, value, code=200):
            self.send_response(code)
            self.end_headers()
            self.wfile.write(json.dumps(value).encode())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def test_a_running_server_is_asked_over_http(server, work, capsys):
    url, asked = server
    words = ["--url", f"{url}/v1/", "--prompt", "2+3?", "--prompt", "hello", "--max-new-tokens", str(NEW)]
    assert molora_cli.main(["check-serving", str(work / "mix"), *words]) == 0, capsys.readouterr()
    assert [body["model"] for body in asked[2:]] == ["base", "tuned"]
    assert {body["model"] for body in asked[:2]} == {"base", "tuned"}
    assert len({body["cache_salt"] for body in asked}) == 4, "no answer from memory"
    assert all(body["temperature"] == 0 and body["return_token_ids"] and len(body["prompt"]) == 2 for body in asked)
    assert molora_cli.main(["check-serving", str(work / "other"), *words, "--name", "tuned"]) == 1


def test_a_server_that_refuses_says_why(server):
    with pytest.raises(MoloraError, match=r"refuses with 404: .*no such model"):
        ask_server(server[0], Job("b", "/a", [[7]], 1), "base", "missing")
    assert [model["id"] for model in server_models(server[0])] == ["base", "tuned"]
