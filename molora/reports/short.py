"""A report in a few sentences, from the adapter's folder alone; no base model is loaded."""

from __future__ import annotations

from molora.reports.account import account_of
from molora.reports.data import Curve
from molora.reports.folder import Folder
from molora.reports.likeness import cosines_of
from molora.reports.summary import sentence
from molora.reports.training import curves_of, loads_of
from molora.writing import size


def in_short(folder: Folder) -> list[str]:
    """Sentences about the training, the experts and what the adapter takes; nothing is said of what is not known.

    Args:
        folder: What lies in the folder of an adapter or a run.
    """
    curves, loads, cosines = curves_of(folder), loads_of(folder, None, ""), cosines_of(folder.adapter)
    account = account_of(folder.adapter, None)
    found = [
        *(_course(curve) for curve in curves if isinstance(curve, Curve) and curve.title == "loss"),
        *(sentence(one) for one in (loads, cosines) if not isinstance(one, str)),
        f"{size(account.bytes['all'])} on disk.",
        *([f"vLLM: {name} {value}." for name, value in account.serving.items() if name.startswith("rank")]),
        *([f"vLLM does not serve it: {account.refused}"] if account.refused else []),
    ]
    return [*found, *folder.notes]


def _course(curve: Curve) -> str:
    parts = []
    for name, series in curve.series.items():
        (first, start), (last, end) = series[0], series[-1]
        parts.append(
            f"{name} {start:.3f} at step {first:g}" + (f", {end:.3f} at step {last:g}" if last != first else "")
        )
    return f"Loss: {'; '.join(parts)}."
