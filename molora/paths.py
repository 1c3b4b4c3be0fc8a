"""Which way an adapted linear goes. From the first that can do it:

| way | does | when |
|---|---|---|
| `rows.py` | products row by row, routing at once | rows of different adapters that are alike, no gradients |
| `fused.py` | one operation of Triton kernels | on a GPU, or asked for; the common kind of adapter |
| `few.py` | the fewest steps | up to 64 tokens, 8 in training mode, no gradients; the common kind of adapter |
| `stack.py` | one read of the input, backward by hand | one adapter whose weights can be read |
| `layer.py` | modules called one by one | everything else, such as sharded weights and several adapters |

`MOLORA_KERNELS` overrules the choice, see `molora.kernels.dispatch`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from molora.few import add_few
from molora.fused import add_fused
from molora.kernels.dispatch import backend, reason, say
from molora.rows import add_rows
from molora.stack import add_stacked, can_stack, only_adapter


def fast_output(
    layer: Any, x: Tensor, adapter_names: list[str] | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor | None:
    """The output of an adapted linear, `[..., in]` to `[..., out]`, or `None` if only the plain way is open.

    Args:
        layer: The linear.
        x: Its input.
        adapter_names: For each row of the batch the adapter to use; `None` for the active one.
        args: Further arguments of the frozen linear.
        kwargs: Likewise.
    """
    kernels, compiling = backend(), torch.compiler.is_compiling()
    by_triton = kernels == "triton" or (kernels == "auto" and x.is_cuda)
    if kernels == "reference" or layer.watcher is not None:
        return None
    # The compiler fuses the plain form by itself.
    if (compiling and not by_triton) or not (compiling or _is_plain_call(x)):
        return None
    if adapter_names is not None:
        base = layer.base_layer
        return None if compiling else add_rows(layer, x, adapter_names, lambda x: base(x, *args, **kwargs), kernels)
    name = only_adapter(layer)
    if name is None:
        return None
    # Some modes keep the outputs of products for later, and the operation writes into one.
    if by_triton and (compiling or not torch._C._len_torch_dispatch_stack()):
        result = add_fused(layer, name, x, args, kwargs, insist=kernels == "triton")
    else:
        result = None
    if compiling:
        return result
    if result is not None:
        say("triton", f"the tensors are on {x.device.type}")
        return result
    if not torch.is_grad_enabled():
        result = add_few(layer, name, x, args, kwargs)
    if result is None and can_stack(layer, name):
        result = add_stacked(layer, name, x, args, kwargs)
    if result is not None:
        say("torch", reason(kernels, x.device.type))
    return result


def _is_plain_call(x: Tensor) -> bool:
    """Whether torch just computes: transforms, traces and kinds of tensors know no functions written by hand."""
    return (
        type(x) in (Tensor, nn.Parameter)
        and not x.is_nested
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and not torch.jit.is_tracing()
    )
