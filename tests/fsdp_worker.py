"""Two processes under FSDP with PEFT's own wrap policy: output as unsharded, and gradients.

Run by `test_peft_use.py`: python fsdp_worker.py PRESET STORE
"""

import os
import sys

import tiny
import torch
from peft import get_peft_model
from peft.utils.other import fsdp_auto_wrap_policy
from torch.distributed.fsdp import FullyShardedDataParallel

from molora import MoLoraConfig, record_routing


def work(rank: int, preset: str, store: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    fields = {"num_experts": 4, "target_modules": ["q_proj", "down_proj"], "init_weights": False}
    model = get_peft_model(tiny.tiny_llama(), MoLoraConfig.from_preset(preset, **fields))
    ids = torch.arange(5, 17).reshape(2, 6)
    expected = model(input_ids=ids).logits.detach()
    os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = "LlamaDecoderLayer"
    sharded = FullyShardedDataParallel(
        model, auto_wrap_policy=fsdp_auto_wrap_policy(model), use_orig_params=True, device_id=torch.device("cpu")
    )
    with record_routing(sharded) as records:
        logits = sharded(input_ids=ids).logits
    torch.testing.assert_close(logits, expected)
    assert len(records) == (4 if preset == "adamole" else 0), len(records)
    logits.sum().backward()
    assert sharded.clip_grad_norm_(1.0) > 0
    torch.distributed.barrier()  # a process that leaves first takes the other down with it
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.spawn(work, args=(sys.argv[1], sys.argv[2]), nprocs=2)
