"""What a report gathers, against values that are known."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from reports import write_adapter, write_base
from tiny import tiny_tokenizer

from molora.reports.account import account_of
from molora.reports.data import Cosines, Curve, Loads, Score
from molora.reports.likeness import cosines_of
from molora.reports.routing import affinity_of, token_routing, usage_of
from molora.reports.routing_sections import affinity_views, load_views, mean_rows
from molora.reports.rows import pieces_of
from molora.reports.summary import dead_experts
from molora.reports.training import MOST_STEPS, curves_of, loads_of, scores_of
from molora.reports.watch import BINS, Seen
from molora.routing.route import Routing
from molora.routing.stacked import StackedRouting
from molora.slim import Adapter, read_adapter
from molora.slim.experts import experts_of


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    folder = tmp_path_factory.mktemp("adapter")
    fields: dict[str, Any] = {"num_experts": 3, "r": 2, "target_modules": ["q_proj", "up_proj"]}
    return read_adapter(write_adapter(folder / "adapter", write_base(folder / "base"), **fields))


@dataclass
class Kept:
    """What a folder holds, as far as the functions here read it."""

    adapter: Any = None
    record: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    history: tuple[list[str], list[dict[str, Any]]] = ([], [])


def test_cosines_are_those_of_the_whole_matrices_and_copies_are_named(adapter: Adapter) -> None:
    name = adapter.modules[0]
    tensors = dict(adapter.tensors)
    for side, dim in (("A", 0), ("B", 1)):
        key = f"base_model.model.{name}.molora_{side}.weight"
        parts = list(tensors[key].split(2, dim=dim))
        parts[2] = parts[0] * 2
        if side == "B":
            parts[1] = parts[1] * 0
        tensors[key] = torch.cat(parts, dim=dim)
    changed = replace(adapter, tensors=tensors)
    found = cosines_of(changed)
    assert isinstance(found, Cosines)
    assert found.pairs == [(name, "0", "2", pytest.approx(1.0))]
    assert found.empty == [(name, "1")]
    for module, bank in experts_of(changed).items():
        flat = torch.stack([(one.scale * one.up @ one.down).flatten().double() for one in bank])
        wanted = torch.nn.functional.normalize(flat, dim=-1)
        got = found.matrices[found.modules.index(module)]
        assert torch.allclose(torch.tensor(got, dtype=torch.double), wanted @ wanted.T, atol=1e-3)


def test_every_byte_and_parameter_is_counted_once(adapter: Adapter) -> None:
    found = account_of(adapter, base=None)
    assert sum(found.parameters.values()) == sum(value.numel() for value in adapter.tensors.values())
    assert found.bytes["all"] == sum(value.nbytes for value in adapter.tensors.values())
    assert found.bytes["all"] == found.bytes["bank of experts"] + found.bytes["routers"]
    # Three experts of rank 2, and a row of the router for each; q_proj is [32, 32], up_proj [64, 32], two of each.
    assert found.serving["rank in fp32"] == "9, needs max_lora_rank 16"
    assert found.serving["memory of one place for an adapter, fp32"] == f"{2 * (64 + 96) * 16 * 4 / 1024:.1f} KiB"


@pytest.mark.parametrize(
    ("entry", "errors", "bound"),
    [
        ({"metric": "accuracy", "value": 0.5, "count": 101}, 0.05, False),
        ({"metric": "exact_match", "value": 0.0, "count": 10}, 0.0, False),
        ({"metric": "token_f1", "value": 0.5, "count": 101}, 0.05, True),
        ({"metric": "token_f1", "value": 0.5, "count": 101, "stderr": 0.01}, 0.01, False),
        ({"metric": "perplexity", "value": 7.0, "count": 101}, None, False),
        ({"metric": "accuracy", "value": 1.0, "count": 1}, None, False),
    ],
)
def test_standard_errors_follow_from_shares_and_are_bounds_elsewhere(
    entry: dict[str, Any], errors: float | None, bound: bool
) -> None:
    found = scores_of(Kept(record={"after": [{"task": "a", **entry}]}))  # type: ignore[arg-type]  # as far as read
    wanted = None if errors is None else pytest.approx(errors)
    assert found == [Score("a", entry["metric"], entry["count"], None, entry["value"], (None, wanted), bound)]


def test_curves_are_what_was_logged_and_evaluation_lies_beside_training() -> None:
    log = [
        {"step": 1, "epoch": 0.1, "loss": 2.0, "molora/dead_experts": 1.0, "flag": True},
        {"step": 2, "loss": float("nan"), "zeta": 3, "word": "x"},
        {"step": 2, "eval_loss": 1.5, "eval_runtime": 3.0},
        {"step": 2, "train_loss": 9.0, "train_runtime": 1.0, "total_flos": 1.0},
        "damaged",
    ]
    found = curves_of(Kept(state={"log_history": log}))  # type: ignore[arg-type]  # as far as read
    assert found == [
        Curve("loss", False, {"train": [(1, 2.0)], "held-out": [(2, 1.5)]}),
        Curve("zeta", False, {"train": [(2, 3)]}),
        Curve("dead experts per linear", True, {"train": [(1, 1.0)]}),
    ]


def test_load_over_training_keeps_first_and_last_steps_and_gaps(adapter: Adapter) -> None:
    names = [adapter.modules[1], adapter.modules[0]]
    load = [[0.5, 0.5, 0.0], None]
    entries = [{"step": step, "load": load} for step in range(1, 101)] + [{"step": 101, "load": "damaged"}]
    found = loads_of(Kept(adapter=adapter, history=(names, entries)), None, "")  # type: ignore[arg-type]  # as read
    assert isinstance(found, Loads)
    assert (found.steps[0], found.steps[-1], len(found.steps)) == (1, 100, MOST_STEPS)
    assert found.end[found.modules.index(names[0])] == [0.5, 0.5, 0.0]
    assert found.end[found.modules.index(names[1])] == []
    assert dead_experts(found) == (1, 3)
    labels, views = load_views(found)
    assert labels == [names[0], names[1], "mean over linears"]
    assert views[0] == views[2] == [[0.5, 0.5, 0.0]] * MOST_STEPS
    assert views[1] == [[]] * MOST_STEPS


def test_means_are_over_what_there_is() -> None:
    assert mean_rows([[[0.2, 0.8], []], [[0.4, 0.6], [1.0, 0.0]], [[1.0], [1.0]]]) == [[0.3, 0.7], [1.0, 0.0]]


def stack(selected: list[list[int]], mask: list[int], threshold: list[float] | None = None) -> StackedRouting:
    """One linear's decisions about one row, every selected expert weighing the same."""
    chosen = torch.tensor([selected]).bool()
    weights = chosen.float()
    levels = None if threshold is None else torch.tensor([threshold]).unsqueeze(-1)
    routing = Routing(weights, weights, chosen, weights, levels)
    rows = torch.Size((1, len(selected)))
    sizes = (1,) * len(selected[0])
    return StackedRouting(("base_model.model.x.0.q",), (routing,), rows, torch.tensor([mask]).bool(), sizes)


def test_experts_per_token_and_thresholds_count_real_tokens() -> None:
    seen = Seen()
    spoken = torch.ones(1, 3, dtype=torch.bool)
    seen.add(stack([[1, 0, 0], [1, 1, 0], [1, 1, 1]], [1, 1, 0], [0.1, 0.3, 0.4]), spoken, 0, 2, 0.4)
    seen.add(stack([[0, 0, 1], [0, 0, 1], [0, 1, 1]], [1, 1, 1], [0.1, 0.1, 0.5]), spoken, 1, 2, 0.4)
    found = usage_of(seen, 0.4)
    assert found.tokens == 5
    assert found.experts == [0.0, 0.6, 0.4, 0.0]
    assert found.mean == pytest.approx(1.4)
    assert found.by_module == {"x.0.q": pytest.approx(1.4)}
    assert found.thresholds is not None
    assert found.thresholds.mean == pytest.approx(1.1 / 5)
    assert sum(found.thresholds.shares) == pytest.approx(1)
    assert found.thresholds.shares[-1] == pytest.approx(0.2), "what is above the highest counts in the last bin"
    assert len(found.thresholds.shares) == BINS


def test_tasks_that_share_no_expert_are_told_apart_for_sure() -> None:
    apart, alike = Seen(), Seen()
    spoken = torch.ones(1, 2, dtype=torch.bool)
    for task in range(2):
        apart.add(stack([[1 - task, task]] * 2, [1, 1]), spoken, task, 2, 1.0)
        alike.add(stack([[1, 1]] * 2, [1, 1]), spoken, task, 2, 1.0)
    for seen, bits in ((apart, 1.0), (alike, 0.0)):
        found = affinity_of(seen, ["one", "two"])
        assert not isinstance(found, str)
        assert found.bits == [pytest.approx(bits, abs=1e-6)]
        assert found.tokens == [2, 2]
        assert affinity_views(found)[0] == [f"x.0.q: {bits:.3f} bits"]
    assert isinstance(affinity_of(apart, ["one"]), str)


def test_tokens_are_counted_exactly_under_autocast() -> None:
    seen, tokens = Seen(), 1001
    with torch.autocast("cpu", torch.bfloat16):
        seen.add(stack([[1, 2, 0]] * tokens, [1] * tokens), torch.ones(1, tokens, dtype=torch.bool), 0, 1, 1.0)
    (sums,) = seen.sums.values()
    assert sums.selected.tolist() == [[[tokens, tokens, 0]]]
    assert sums.answers.sum().item() == pytest.approx(tokens, rel=1e-6)


def test_a_texts_routing_is_averaged_over_all_and_by_layer() -> None:
    weights = {
        "x.0.q": torch.tensor([[1.0, 0.0], [0.5, 0.5]]),
        "x.0.v": torch.tensor([[0.0, 1.0], [0.5, 0.5]]),
        "x.1.q": torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 1.0]]),
    }
    found = token_routing(weights, ["a", "b"], "words")
    assert not isinstance(found, str)
    assert found.groups == ["all linears", "layer 0", "layer 1"]
    assert found.weights[1] == [[0.5, 0.5, 0.0], [0.5, 0.5, 0.0]]
    assert found.weights[0][0] == [0.333, 0.333, 0.333]
    few = token_routing(weights, ["a"], "words", left_out=1)
    assert not isinstance(few, str)
    assert ([len(own) for own in few.weights], few.left_out) == ([1, 1, 1], 1)
    assert isinstance(token_routing({}, [], "words"), str)


class ByBytes:
    """A tokenizer whose tokens are single bytes, so that one character may take several."""

    def decode(self, ids: list[int], **_: Any) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


@pytest.mark.parametrize("text", ["plain", "Grüße, 東京!", "🙂", "a\n\nb"])
def test_pieces_of_a_text_put_together_are_the_text(text: str) -> None:
    pieces = pieces_of(list(text.encode()), ByBytes())  # type: ignore[arg-type]  # it decodes
    assert "".join(pieces) == text
    assert len(pieces) == len(text.encode())
    tokenizer = tiny_tokenizer()
    own = tokenizer("a b<|im_end|>")["input_ids"]
    assert pieces_of(own, tokenizer) == ["a", " ", "b", "<|im_end|>"]
