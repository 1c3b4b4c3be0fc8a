"""Kernels run in Triton's interpreter unless there is a GPU. Triton asks once, when the kernels are imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
