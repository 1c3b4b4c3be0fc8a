"""From a mixture to llama.cpp: the nearest plain LoRA, what it costs, and a GGUF file of it that is read back.

    python examples/to_llama_cpp.py
    python examples/to_llama_cpp.py --adapter DIR

Without an adapter it trains a small one. One run with one seed, on 4 rows that nothing was fitted to; most of its time
goes into the two exports:

                  perplexity  KL to routed  output error
    base              8.7092        1.1352             -
    routed            2.7710             -             -
    uniform           2.7969        0.0030        0.0327
    usage             2.8133        0.0026        0.0326
    calibrated        2.7997        0.0014        0.0115

    adapter.gguf: adapter lora, 11.1 MiB, rank 48, 45 pairs; 30 compared with PEFT's, B A differ by 0.0e+00 at most.

`calibrated` is what was written; `usage`, every expert by its mean weight, would have lost more. Little is lost with
`recommended`: its two shared experts are a plain LoRA already. llama.cpp itself is not run here: the commands at the
end do.
"""

import argparse
import shlex
from pathlib import Path

import torch
from datasets import load_dataset
from gguf import GGUFReader
from peft import get_peft_model
from safetensors.torch import load_file
from trl import SFTConfig

from molora import MoLoraConfig, export_adapter
from molora.base import gguf_of, load_base
from molora.trainers import MoLoraSFTTrainer
from molora.writing import check_place

DATA = Path(__file__).parent / "data"
TRAIN = DATA / "arithmetic.train.jsonl"
# Of the linears whose rows stand in the same order in both files. Those of q and k are rearranged for llama.cpp.
NAMES = {
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}


def train(given: argparse.Namespace) -> str:
    """Train a small mixture for a few steps, and return its folder."""
    torch.manual_seed(0)
    model, tokenizer = load_base(given.model_name_or_path, dtype="float32")
    config = MoLoraConfig.from_preset(
        "recommended",
        num_experts=4,
        depth_range=[0.5, 1.0],  # the upper half of the layers: less time than all of them
        target_modules=["q_proj", "v_proj", "up_proj"],
        task_type="CAUSAL_LM",
    )
    rows = load_dataset("json", data_files=str(TRAIN), split=f"train[:{given.rows}]")
    rows = rows.map(lambda row: {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]})
    trainer = MoLoraSFTTrainer(
        model=get_peft_model(model, config),
        args=SFTConfig(
            output_dir=f"{given.output_dir}/mixture",
            max_steps=given.max_steps,
            per_device_train_batch_size=4,
            learning_rate=5e-4,
            logging_steps=4,
            save_strategy="no",
            report_to="none",
            activation_checkpointing=False,  # rows are short, so memory is no matter
            use_cpu=not torch.cuda.is_available(),
            bf16=torch.cuda.is_available(),
        ),
        train_dataset=rows.select_columns(["prompt", "completion"]),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()
    return trainer.args.output_dir


def difference(lora: Path, gguf: Path) -> str:
    """How far the `B A` of a GGUF file are from those of PEFT's folder, in words."""
    weights = load_file(lora / "adapter_model.safetensors")
    stored = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in GGUFReader(gguf).tensors}
    compared, largest = 0, 0.0
    for name, a in weights.items():
        path = name.split(".")
        if path[-2] != "lora_A" or path[-3] not in NAMES:
            continue
        pair = f"blk.{path[path.index('layers') + 1]}.{NAMES[path[-3]]}.weight.lora_"
        b = weights[name.replace("lora_A", "lora_B")]  # alpha is the rank in both files, so no scale is missing
        largest = max(largest, (b @ a - stored[pair + "b"] @ stored[pair + "a"]).abs().max().item())
        compared += 1
    return f"{len(stored) // 2} pairs; {compared} compared with PEFT's, B A differ by {largest:.1e} at most"


def main(argv: list[str] | None = None) -> None:
    """Train or take an adapter, export it twice, and say how to run it."""
    parser = argparse.ArgumentParser(description="Export a mixture for llama.cpp.")
    parser.add_argument(
        "--model_name_or_path", default="smollm2-135m-instruct", help="read if nothing is given to export"
    )
    parser.add_argument("--output_dir", default="runs/to_llama_cpp", help="new folder")
    parser.add_argument("--max_steps", type=int, default=12)
    parser.add_argument("--rows", type=int, default=48, help="to train on, and to calibrate with")
    parser.add_argument("--adapter", help="folder of a trained adapter; without, one is trained")
    parser.add_argument("--data", help="rows to calibrate with; default: what the adapter was trained on")
    given = parser.parse_args(argv)
    check_place(given.output_dir)
    adapter = given.adapter or train(given)
    # `molora train` leaves beside an adapter where its data lies, for which () asks; a trainer in Python does not.
    data = (given.data,) if given.data else () if given.adapter else (str(TRAIN),)

    # A mixture that routes every token is no LoRA. This fits the nearest one, and measures it on rows it was not
    # fitted to. Scores by generating would take minutes: `evaluate=True` adds them.
    out = Path(given.output_dir)
    options = {"calibrate": data, "rows": given.rows, "evaluate": False}
    report = export_adapter(adapter, out / "lora", target="lora", **options)
    export_adapter(adapter, out / "gguf", target="gguf-lora", **options)  # the same fit, as llama.cpp reads it
    file = out / "gguf" / "adapter.gguf"

    print(f"\n{'':12}{'perplexity':>12}{'KL to routed':>14}{'output error':>14}")
    for name, quality in report.quality.items():
        numbers = (quality.perplexity, quality.kl, quality.output_error)
        print(f"{name:12}{_shown(numbers[0]):>12}{_shown(numbers[1]):>14}{_shown(numbers[2]):>14}")
    fields = GGUFReader(file).fields
    kind = fields["general.type"].contents(), fields["adapter.type"].contents()
    print(f"\n{file}: {' '.join(kind)}, {file.stat().st_size / 2**20:.1f} MiB, rank {report.rank}, "
          f"{difference(out / 'lora', file)}.")  # fmt: skip
    base = gguf_of(report.base_model)
    if base is None:
        print(f"BASE.gguf is a GGUF file of {report.base_model}: convert_hf_to_gguf.py of llama.cpp makes one.")
    base, file = shlex.quote(str(base or "BASE.gguf")), shlex.quote(str(file))
    print(f"llama-cli -m {base} --lora {file} -p 'Problem: Tom had 9 cakes and ate 4. How many are left?'")
    print(f"llama-server -m {base} --lora {file}")


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


if __name__ == "__main__":
    main()
