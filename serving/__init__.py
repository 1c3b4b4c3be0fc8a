"""Plug-in for vLLM: mixtures of LoRA experts, routed token by token, wherever vLLM takes a LoRA.

vLLM calls `register` in every one of its processes. Nothing of molora is imported until a mixture is loaded; on a GPU
by the processes that hold the model, as the tables that route have to be there when graphs are captured.
"""

from __future__ import annotations

import logging

__all__ = ["register"]


def register() -> None:
    """Entry point of the group `vllm.general_plugins`; may be called more than once.

    If this vLLM is not one that the plug-in fits, nothing is changed but the log: vLLM then refuses folders of
    mixtures by itself, as it knows no tensors of such names.
    """
    from molora_vllm.compatibility import differences, is_tested, versions

    logger = logging.getLogger("vllm.plugins.molora")  # below `vllm`, whose handler prints it
    found = differences()
    if found:
        logger.error(
            "molora's plug-in is off, and mixtures of experts are refused: %s differs from vLLM %s, which it is made "
            "for: %s. Install one of these versions, or serve the nearest plain LoRA: `molora export DIR OUT --as "
            "lora --calibrate data.jsonl`.",
            *versions(),
            "; ".join(found),
        )
        return
    if not is_tested():
        logger.warning(
            "%s is none of the versions that molora's plug-in was tested with (%s); everything it uses looks the "
            "same. `molora check-serving DIR` says whether answers are right.",
            *versions(),
        )
    from molora_vllm.hooks import install

    install()
