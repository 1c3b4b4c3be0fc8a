"""Mix LoRAs that PEFT trained, one for each task, without training anything further and without changing them.

    python examples/compose_loras.py

One run with one seed, 16 held-out rows a task; 6 minutes of processor time on a core of an AMD EPYC without AVX-512:

    held-out loss         pronunciation      sentiment     arithmetic           mean
    base model                    6.450          2.738          1.691          3.626
    LoRA pronunciation            3.800          1.476          1.138          2.138
    LoRA sentiment                6.274          0.198          0.960          2.477
    LoRA arithmetic               6.021          1.054          0.452          2.509
    all, selma                    4.745          0.247          0.675          1.889
    all, arrow                    4.430          0.215          0.642          1.762

Each LoRA is best at its own task, and a mixture of all is better over all tasks than any of them. Nobody says which
task a row is of. The LoRA of a task stays better at it, if one knows the task.
"""

import argparse
import json
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from trl import SFTConfig, SFTTrainer

from molora import routing_inputs
from molora.base import load_base
from molora.compose import compose
from molora.writing import check_place

DATA = Path(__file__).parent / "data"
TASKS = ("pronunciation", "sentiment", "arithmetic")
# selma is the mean of the LoRAs; arrow routes each token to those that its input stretches most. Neither needs data.
MIXTURES = ("selma", "arrow")


def rows_of(task: str, part: str, rows: int) -> Dataset:
    """The first rows of a task, as TRL reads them."""
    lines = (DATA / f"{task}.{part}.jsonl").read_text(encoding="utf-8").splitlines()[:rows]
    messages = [json.loads(line)["messages"] for line in lines]
    return Dataset.from_list([{"prompt": m[:-1], "completion": m[-1:]} for m in messages])


def trainer_of(model, tokenizer, task: str, given: argparse.Namespace) -> SFTTrainer:
    """TRL's own trainer, to train one LoRA on one task, and to measure any model on all of them."""
    return SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=f"{given.output_dir}/loras/{task}",
            max_steps=given.max_steps,
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            logging_steps=given.max_steps,
            save_strategy="no",
            report_to="none",
            activation_checkpointing=False,  # rows are short, so memory is no matter
            use_cpu=not torch.cuda.is_available(),
            bf16=torch.cuda.is_available(),
        ),
        train_dataset=rows_of(task, "train", given.rows),
        eval_dataset={one: rows_of(one, "test", max(1, given.rows // 3)) for one in TASKS},
        processing_class=tokenizer,
    )


def line_of(name: str, trainer: SFTTrainer) -> str:
    """Held-out loss of each task, and their mean."""
    found = trainer.evaluate()
    losses = [found[f"eval_{task}_loss"] for task in TASKS]
    return f"{name:20}" + "".join(f"{loss:15.3f}" for loss in (*losses, sum(losses) / len(losses)))


def main(argv: list[str] | None = None) -> None:
    """Train the LoRAs, mix them, and measure."""
    parser = argparse.ArgumentParser(description="Mix trained LoRAs.")
    parser.add_argument("--model_name_or_path", default="smollm2-135m-instruct")
    parser.add_argument("--output_dir", default="runs/compose_loras")
    parser.add_argument("--max_steps", type=int, default=12, help="of each LoRA")
    parser.add_argument("--rows", type=int, default=48, help="to train on, of each task; a third as many are held out")
    given = parser.parse_args(argv)
    check_place(given.output_dir)
    lines = [f"{'held-out loss':20}" + "".join(f"{title:>15}" for title in (*TASKS, "mean"))]
    folders = [Path(given.output_dir) / "loras" / task for task in TASKS]

    def base():
        return load_base(given.model_name_or_path, dtype="float32")

    for task in TASKS:
        torch.manual_seed(0)
        model, tokenizer = base()
        config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM")
        trainer = trainer_of(get_peft_model(model, config), tokenizer, task, given)
        if task == TASKS[0]:
            lines.append(line_of("base model", trainer))  # a new LoRA adds nothing
        trainer.train()
        trainer.save_model()
        lines.append(line_of(f"LoRA {task}", trainer))
    before = [(folder / "adapter_model.safetensors").read_bytes() for folder in folders]

    for preset in MIXTURES:
        model, tokenizer = base()
        mixture = compose(model, folders, preset=preset)
        lines.append(line_of(f"all, {preset}", trainer_of(mixture, tokenizer, TASKS[0], given)))
        mixture.save_pretrained(f"{given.output_dir}/{preset}")

    # Each LoRA is still there: alone in the mixture, here arrow, an expert answers as the LoRA does.
    batch = tokenizer("Word: lovely", return_tensors="pt")
    alone = PeftModel.from_pretrained(base()[0], folders[0]).eval()
    first = torch.eye(len(TASKS))[0]
    with torch.no_grad(), routing_inputs(mixture.eval().cpu(), expert_weights=first):
        difference = (mixture(**batch).logits - alone(**batch).logits).abs().max().item()
    print("\n" + "\n".join(lines))
    print(f"\nThe first expert alone and the first LoRA: logits differ by {difference:.1e} at most.")
    same = before == [(folder / "adapter_model.safetensors").read_bytes() for folder in folders]
    print(f"The LoRAs' files are {'as they were' if same else 'CHANGED'}.")
    print(f"The same from the command line: molora compose OUT --preset {preset} "
          + " ".join(f"--adapter {folder}" for folder in folders))  # fmt: skip


if __name__ == "__main__":
    main()
