"""The plain LoRA that is merged in place of a mixture: exact where that can be, else as was asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from torch import Tensor, nn

from molora.bank import MoLoraLayer
from molora.errors import MergeError, MoloraError
from molora.fold import Factors
from molora.plain.calibrate import calibrate
from molora.plain.fixed import Fixed, fixed_factors, layers_of
from molora.plain.moments import Batch


class HowToMerge(TypedDict, total=False):
    """What a merge may be told beside the adapter's name.

    Attributes:
        task: Id of the task, for routers that read it; the merge is exact for this task.
        expert_scores: A number per expert, for routing that reads them.
        prompt: Ids of one prompt, for routers that decide once per sequence; exact for what follows this prompt.
        approximate: Merge the nearest plain LoRA where no exact one exists; needs `calibration`.
        calibration: Batches to fit it to, as `molora.plain.calibrate.batches_by_part` deals them out.
        factors: Merge this plain LoRA: for each linear, by its full name in the base model, A `[r, in]` and B
            `[out, r]`.
    """

    task: int | None
    expert_scores: Sequence[float] | None
    prompt: Tensor | None
    approximate: bool
    calibration: Mapping[str, Sequence[Batch]] | None
    factors: Mapping[str, Factors] | None


def stand_ins(
    model: nn.Module,
    adapter_name: str,
    task: int | None = None,
    expert_scores: Sequence[float] | None = None,
    prompt: Tensor | None = None,
    approximate: bool = False,
    calibration: Mapping[str, Sequence[Batch]] | None = None,
    factors: Mapping[str, Factors] | None = None,
) -> dict[str, Factors]:
    """The plain LoRA to merge for an adapter, by the full names of its linears.

    Args:
        model: A model with the adapter.
        adapter_name: Its name.
        task: As in `HowToMerge`.
        expert_scores: Likewise.
        prompt: Likewise.
        approximate: Likewise.
        calibration: Likewise.
        factors: Likewise.

    Raises:
        MergeError: If no exact one exists and none to come near was asked for.
        MoloraError: If it was asked for without data.
    """
    if factors is not None:
        _check(layers_of(model, adapter_name), factors)
        return dict(factors)
    if calibration is not None and not approximate:
        raise MoloraError("calibration data is given, so pass approximate=True too: the merge will not be exact.")
    try:
        return fixed_factors(model, adapter_name, Fixed(task, expert_scores, prompt))
    except MergeError:
        if not approximate:
            raise
    if calibration is None:
        raise MoloraError(
            "approximate=True needs `calibration=`: batches for `fit`, `choose` and `judge`, as "
            "`molora.plain.calibrate.batches_by_part(rows, collate, batch_size)` deals them out."
        )
    fitted = calibrate(model, calibration, adapter_name)
    return dict(fitted.loras["calibrated"].factors)


def check_tied(model: Any, adapter_names: Sequence[str]) -> None:
    """Refuse to merge into a matrix that is embedding and output layer in one.

    Args:
        model: The base model with the adapters.
        adapter_names: Those to merge.

    Raises:
        MergeError: If one of them changes it.
    """
    if not hasattr(model, "get_output_embeddings"):
        return
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    changed = isinstance(output, MoLoraLayer) and any(map(output.has_adapter, adapter_names))
    if changed and embedding is not None and output.get_base_layer().weight is getattr(embedding, "weight", None):
        raise MergeError(
            "the adapter changes the output layer, whose weight is the input embedding too, so merging would change "
            "both. Export a LoRA instead, or train without the output layer."
        )


def _check(layers: Mapping[str, Any], factors: Mapping[str, Factors]) -> None:
    """Refuse factors that do not fit, before a weight is touched."""
    if factors.keys() != layers.keys():
        wrong = sorted(factors.keys() ^ layers.keys())
        raise MoloraError(f"factors must name the {len(layers)} adapted linears; {wrong[0]} is no part of both.")
    for name, (down, up) in factors.items():
        wanted = (layers[name].in_features, layers[name].out_features)
        if down.ndim != 2 or up.ndim != 2 or (down.shape[1], up.shape[0]) != wanted or len(down) != up.shape[1]:
            given = f"{list(down.shape)} and {list(up.shape)}"
            raise MoloraError(f"factors of {name} are {given}; must be [r, {wanted[0]}] and [{wanted[1]}, r].")
