"""Who `molora check-serving` asks: an engine, which is played here, and the right adapter on a server."""

import pytest

from molora.errors import ConfigError, MoloraError
from molora.serving.engines import GROUPS, Job, ask_engine, names_on_server

ENGINE = '''
"""Plays vLLM: says what it was given, or fails as told by the model's name."""
import os

class Entry:
    logprob = -0.5

class Output:
    def __init__(self, ids, adapter, engine):
        assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0" and os.environ["SET"] == "1"
        tokens = [len(ids), adapter.lora_int_id if adapter else 0, engine.asked]
        self.outputs = [type("", (), {"token_ids": tokens, "logprobs": [{token: Entry()} for token in tokens]})]

class LLM:
    def __init__(self, **engine):
        assert engine["enable_lora"] and not engine["enable_prefix_caching"]
        self.engine, self.asked = engine, 0
        if engine["model"] == "refused":
            raise ValueError("no such model")
        if engine["model"] == "killed":
            print("INFO starting")
            print("WorkerError: out of memory")
            os._exit(9)

    def generate(self, prompts, sampling, lora_request, use_tqdm):
        self.asked += 1
        assert sampling.temperature == 0.0
        return [Output(p["prompt_token_ids"], a, self) for p, a in zip(prompts, lora_request, strict=True)]

class SamplingParams:
    def __init__(self, **fields):
        self.__dict__.update(fields)
'''
REQUEST = """
class LoRARequest:
    def __init__(self, name, lora_int_id, path):
        assert path == "/adapter"
        self.lora_int_id = lora_int_id
"""


@pytest.fixture
def engine(tmp_path):
    """Environment in which `vllm` is the one above."""
    package = tmp_path / "vllm"
    (package / "lora").mkdir(parents=True)
    (package / "__init__.py").write_text(ENGINE)
    (package / "lora/__init__.py").write_text("")
    (package / "lora/request.py").write_text(REQUEST)
    return {"PYTHONPATH": str(tmp_path), "SET": "1"}


def test_an_engine_is_asked_for_each_alone_and_for_both_in_one_batch(engine):
    served = ask_engine(Job("model", "/adapter", [[7], [7, 8]], 3), engine)
    assert list(served) == list(GROUPS)
    found = {group: [tuple(answer.tokens) for answer in answers] for group, answers in served.items()}
    assert {name: [tokens[:2] for tokens in found[name]] for name in found} == {
        "base": [(1, 0), (2, 0)],
        "adapter": [(1, 1), (2, 1)],
        "mixed_base": [(1, 0), (2, 0)],
        "mixed_adapter": [(1, 1), (2, 1)],
    }
    batches = {name: {tokens[2] for tokens in found[name]} for name in found}
    assert batches["mixed_base"] == batches["mixed_adapter"]
    assert len({*batches["base"], *batches["adapter"], *batches["mixed_base"]}) == 3
    assert all(answer.logprobs == [-0.5] * 3 for answers in served.values() for answer in answers)


@pytest.mark.parametrize(
    ("model", "says"),
    [("refused", "ValueError: no such model"), ("killed", "exit code 9\n  WorkerError: out of memory")],
)
def test_an_engine_that_fails_says_why(model, says, engine):
    with pytest.raises(MoloraError) as caught:
        ask_engine(Job(model, "/adapter", [[7]], 3), engine)
    assert says in str(caught.value)
    assert "INFO" not in str(caught.value)


def test_an_engine_has_room_for_the_longest_prompt_and_all_answers():
    arguments = Job("m", "/a", [[1] * 40, [1]], 24, "bfloat16", 64, 2).engine()
    assert (arguments["max_model_len"], arguments["max_num_seqs"]) == (64, 4)
    assert (arguments["max_lora_rank"], arguments["tensor_parallel_size"], arguments["dtype"]) == (64, 2, "bfloat16")


MODELS = [
    {"id": "base"},
    {"id": "one", "root": "/runs/first", "parent": "base"},
    {"id": "two", "root": "/runs/second", "parent": "base"},
]


@pytest.mark.parametrize(
    ("folder", "name", "expected"),
    [("/runs/second", None, "two"), ("/copies/one", None, "one"), ("/copies/x", "two", "two")],
)
def test_an_adapter_is_found_on_a_server_by_name_or_folder(folder, name, expected):
    assert names_on_server(MODELS, folder, name) == ("base", expected)


@pytest.mark.parametrize(
    ("folder", "name", "says"),
    [
        ("/copies/x", None, "none of its adapters comes from /copies/x; the server has: one, two. Give --name"),
        ("/runs/first", "tow", "there is no adapter 'tow'; the server has: one, two. Did you mean 'two'?"),
        ("/runs/first", "base", "there is no adapter 'base'"),
    ],
)
def test_an_adapter_that_a_server_has_not_is_refused(folder, name, says):
    with pytest.raises(ConfigError) as caught:
        names_on_server(MODELS, folder, name)
    assert says in str(caught.value)
