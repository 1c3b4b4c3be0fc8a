"""Time one training step of each preset against a plain PEFT LoRA of the same total rank, interleaved in one run.

    python benchmarks/training_step.py --model smollm2-135m-instruct --rows 16 --length 72 --rounds 5

Prints, for each method, the median over rounds of its step time divided by that of LoRA's in the same round. Only
the body of the model is timed (no language-model head, no optimizer), forward and backward, under bf16 autocast.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model

from molora import MoLoraConfig
from molora.base import load_base


def step_of(model_name: str, preset: str | None, ids: torch.Tensor, rank: int, experts: int) -> Callable[[], float]:
    """Build a model and return a function that runs one step and returns its seconds."""
    base, _ = load_base(model_name, dtype="bfloat16", attn_implementation="eager")
    if preset is None:
        config = LoraConfig(r=rank * experts, target_modules="all-linear")
    elif preset == "lora":
        config = MoLoraConfig.from_preset(preset, r=rank * experts, target_modules="all-linear")
    else:
        config = MoLoraConfig.from_preset(preset, r=rank, num_experts=experts, target_modules="all-linear")
    model = get_peft_model(base, config).train()
    body = model.get_base_model().model
    mask = torch.ones_like(ids)

    def step() -> float:
        started = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            hidden = body(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            loss = hidden.float().square().mean()
        loss.backward()
        model.zero_grad(set_to_none=True)
        return time.perf_counter() - started

    return step


def main() -> None:
    """Run the comparison and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--presets", nargs="*", default=["lora", "static", "mole", "adamole"])
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=72)
    parser.add_argument("--rank", type=int, default=4, help="rank of one expert")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    ids = torch.randint(5, 10_000, (arguments.rows, arguments.length))
    names: list[str | None] = [None, *arguments.presets]
    steps = [step_of(arguments.model, name, ids, arguments.rank, arguments.experts) for name in names]
    for step in steps:
        step()
    rounds = [[step() for step in steps] for _ in range(arguments.rounds)]
    machine = platform.processor() or platform.machine()
    print(f"{machine}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{arguments.model}, {arguments.rows} x {arguments.length} tokens, {arguments.experts} x r={arguments.rank}")
    for position, name in enumerate(names):
        seconds = statistics.median(times[position] for times in rounds)
        ratios = [times[position] / times[0] for times in rounds]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(f"{name or 'PEFT LoRA':10} {seconds:6.2f} s  x{statistics.median(ratios):.2f} ({spread})")


if __name__ == "__main__":
    main()
