"""Time a batch in which every row has an adapter of its own, against the same batch with one adapter.

    python -m benchmarks.mixed_batch
    python -m benchmarks.mixed_batch --batch 16 --length 128

Two tables, for prompts of `--length` tokens and for one token a row. The latter is a decoding step without a past,
which costs all methods the same. `adapter_names=[...]` is PEFT's interface.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor

from benchmarks import checks, report
from benchmarks.command import SAME, Row, asked, columns_of, noise_in, parser, sizes_of
from benchmarks.harness import Measure, clock_for, compare, spread, timed
from benchmarks.methods import Sizes, available, base_model, lora_config, molora_config, own_methods
from molora.kernels import dispatch

Config = Any


def with_adapters(config: Config, sizes: Sizes, names: Sequence[str]) -> PeftModel:
    """A random Llama with several adapters of one kind, each drawn by itself."""
    model: Any = get_peft_model(base_model(sizes), config, adapter_name=names[0], autocast_adapter_dtype=False)
    for name in names[1:]:
        model.add_adapter(name, dataclasses.replace(config), autocast_adapter_dtype=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "molora_B" in name:
                parameter.normal_(std=0.01)
    model.set_adapter(names[0])
    return model.eval()


@torch.no_grad()
def logits_of(model: PeftModel, ids: Tensor, names: list[str] | None) -> Tensor:
    """Logits `[B, S, vocab]`; `names` gives each row its adapter, `None` all rows the active one."""
    given = {} if names is None else {"adapter_names": names}
    return model(input_ids=ids, use_cache=False, **given).logits


def check_rows(title: str, model: PeftModel, ids: Tensor, names: list[str], tolerance: float) -> float:
    """Each row of a mixed batch must come out as it does alone with its adapter, in plain torch.

    Raises:
        WrongResultError: Naming the row.
    """
    mixed, worst = logits_of(model, ids, names), 0.0
    for row, name in enumerate(names):
        model.set_adapter(name)
        with checks.kernels("reference"):
            alone = logits_of(model, ids[row : row + 1], None)
        error, _ = checks.largest_error({"the logits": mixed[row : row + 1]}, {"the logits": alone})
        if not error <= tolerance:
            raise checks.WrongResultError(
                f"{title!r}: row {row} of a mixed batch differs from the same row alone with its adapter {name!r}: "
                f"relative error {error:.1e}, allowed is {tolerance:.0e}. Nothing was timed."
            )
        worst = max(worst, error)
    model.set_adapter(names[0])
    return worst


def main(given: Sequence[str] | None = None) -> int:
    """Run the comparison and print it; the exit status."""
    arguments = parser(str(__doc__), batch=8, length=64).parse_args(given)
    torch.set_num_threads(arguments.threads)
    sizes = sizes_of(arguments)
    names = [f"adapter{index}" for index in range(arguments.batch)]
    prompts = torch.randint(1, arguments.vocab, (arguments.batch, arguments.length), generator=torch.manual_seed(0))
    configs, missing = _configs(sizes)
    wanted = {*asked(list(configs), arguments.only), next(iter(configs))}
    configs = {name: config for name, config in configs.items() if name in wanted}
    models = {title: with_adapters(config, sizes, names) for title, config in configs.items()}
    try:
        tolerance = checks.TOLERANCES[sizes.dtype]
        checked = {
            title: max(check_rows(title, model, ids, names, tolerance) for ids in (prompts, prompts[:, :1]))
            for title, model in models.items()
        }
    except checks.WrongResultError as error:
        print(f"mixed_batch: {error}", file=sys.stderr)
        return 1
    # Built only now: the reference a second time, for the A/A rows.
    first = next(iter(configs))
    again = with_adapters(configs[first], sizes, names)
    clock_name = clock_for(arguments.threads)[1]
    shapes = dataclasses.asdict(sizes) | {"batch": arguments.batch, "length": arguments.length}
    shapes |= {"dtype": arguments.dtype, "adapters": len(names)}
    print(report.heading("mixed_batch", arguments.threads, clock_name, shapes))
    rows: list[dict[str, Any]] = []
    for part, ids in ((f"prompts of {arguments.length}", prompts), ("one token a row", prompts[:, :1])):
        rows += _table(part, models, again, ids, names, arguments)
    for name, why in missing.items():
        print(f"left out: {name}: {' '.join(why.split())}")
    content: dict[str, Any] = {
        "shapes": shapes,
        "clock": clock_name,
        "kernels": dispatch.backend(),
        "checked": checked,
    }
    content |= {"reference": f"{first}, one adapter", "rows": rows, "missing": missing}
    report.write_json(arguments.json, "mixed_batch", arguments.threads, content)
    return 0


def _configs(sizes: Sizes) -> tuple[dict[str, Config], dict[str, str]]:
    configs: dict[str, Config] = {f"PEFT LoRA r={sizes.active_rank}": lora_config(sizes.active_rank)}
    found, missing = available(own_methods(sizes), sizes)
    fields = {
        f"molora top-{sizes.top_k}": {},
        f"molora top-{sizes.top_k}, router per input": {"router_sharing": "input"},
    }
    for name, given in fields.items():
        if any(method.name == name for method in found):
            configs[name] = molora_config(sizes, **given)
    return configs, {name: missing[name] for name in fields if name in missing}


def _table(
    part: str,
    models: dict[str, PeftModel],
    again: PeftModel,
    ids: Tensor,
    names: list[str],
    arguments: argparse.Namespace,
) -> list[dict[str, Any]]:
    clock, _ = clock_for(arguments.threads)

    def measure(model: PeftModel, by_row: list[str] | None) -> Measure:
        return timed(lambda: logits_of(model, ids, by_row), clock)

    first = next(iter(models))
    reference = measure(models[first], None)
    one, many = "one adapter", f"{len(names)} adapters"
    measures = {f"{SAME} {first}, {one}, first": measure(again, None)}
    for title, model in models.items():
        if title != first:
            measures[f"{title}, {one}"] = measure(model, None)
        measures[f"{title}, {many}"] = measure(model, names)
    measures[f"{SAME} {first}, {one}, last"] = measure(again, None)
    rows = []
    for name, candidate in measures.items():
        pairs = compare(candidate, reference, arguments.pairs)
        rows.append(Row(name, "peft" if "PEFT" in name else "molora", pairs, spread(pairs.ratios)))
    noise = noise_in(rows)
    singles = {row.name.removesuffix(f", {one}"): row.spread.median for row in rows if row.name.endswith(one)}
    cells = []
    for row in rows:
        title = row.name.removesuffix(f", {many}")
        own = row.spread.median / singles.get(title, 1.0) if row.name.endswith(many) else None
        cells.append(columns_of(row, "PEFT, one", noise, None, "") | {"x its one adapter": own})
    print(f"\n{part}")
    print(report.table(list(cells[0]), cells))
    print(f"Noise from the A/A rows: {noise:.3f}")
    return [{"part": part, "noise": noise} | row.as_json(noise) for row in rows]


if __name__ == "__main__":
    sys.exit(main())
