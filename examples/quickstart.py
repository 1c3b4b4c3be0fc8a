"""Train a mixture of LoRA experts with adaptive thresholds in Python, save it, and load it again."""

import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, get_peft_model
from trl import SFTConfig

from molora import MoLoraConfig  # importing molora registers the method with PEFT
from molora.base import load_base
from molora.trainers import MoLoraSFTTrainer

model, tokenizer = load_base("smollm2-135m-instruct", dtype="float32")  # or transformers' from_pretrained
config = MoLoraConfig.from_preset("adamole", num_experts=4, target_modules="all-linear", task_type="CAUSAL_LM")
model = get_peft_model(model, config)
model.print_trainable_parameters()

rows = [
    {
        "prompt": [{"role": "user", "content": f"What is {a} plus {b}?"}],
        "completion": [{"role": "assistant", "content": str(a + b)}],
    }
    for a in range(8)
    for b in range(8)
]
trainer = MoLoraSFTTrainer(
    model=model,
    args=SFTConfig(
        output_dir="runs/example",
        max_steps=4,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        logging_steps=1,
        use_cpu=not torch.cuda.is_available(),
        bf16=torch.cuda.is_available(),
    ),
    train_dataset=Dataset.from_list(rows),
    processing_class=tokenizer,
)
trainer.train()
trainer.save_model()

reloaded = AutoPeftModelForCausalLM.from_pretrained("runs/example")
print(reloaded.active_peft_config.selection)
