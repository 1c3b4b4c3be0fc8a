"""The plain LoRA that is merged in place of a mixture: exact where that can be, else as was asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from torch import Tensor, nn

from molora.errors import MergeError, MoloraError
from molora.export.calibrate import calibrate
from molora.export.fixed import Fixed, fixed_factors
from molora.export.moments import Batch
from molora.fold import Factors


class HowToMerge(TypedDict, total=False):
    """What a merge may be told beside the adapter's name.

    Attributes:
        task: Id of the task, for routers that read it; the merge is exact for this task.
        expert_scores: A number per expert, for routing that reads them.
        prompt: Ids of one prompt, for routers that decide once per sequence; exact for what follows this prompt.
        approximate: Merge the nearest plain LoRA where no exact one exists; needs `calibration`.
        calibration: Batches to fit it to, as `molora.export.calibrate.batches_by_part` deals them out.
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
            "`molora.export.calibrate.batches_by_part(rows, collate, batch_size)` deals them out."
        )
    fitted: Any = calibrate(model, calibration, adapter_name)
    return dict(fitted.loras["calibrated"].factors)
