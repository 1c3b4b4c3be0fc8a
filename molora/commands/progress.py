"""A training log one can read: the progress bar, and one short line for each log entry."""

from __future__ import annotations

from typing import Any

from transformers import PrinterCallback, ProgressCallback, Trainer

COLUMNS = {
    "loss": "loss {:.3f}",
    "mean_token_accuracy": "token accuracy {:.2f}",
    "molora/experts_per_token": "experts a token {:.2f}",
    "molora/load_max": "largest load {:.2f}",
    "molora/threshold_mean": "threshold {:.3f}",
    "learning_rate": "lr {:.1e}",
}


class CompactProgress(ProgressCallback):
    """transformers' progress bar, printing the few numbers a person follows; the trainer state has them all."""

    @classmethod
    def install(cls, trainer: Trainer) -> None:
        """Replace the trainer's own progress callback, if it shows one."""
        for shown in (ProgressCallback, PrinterCallback):
            if trainer.pop_callback(shown) is not None:
                trainer.add_callback(cls)
                return

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Print one line for a training entry; leave evaluations to transformers, and the summary to the end table."""
        if not logs or "train_runtime" in logs:
            return
        if "loss" not in logs:
            super().on_log(args, state, control, logs=logs, **kwargs)
        elif state.is_world_process_zero and self.training_bar is not None:
            known = {name: float(logs[name]) for name in COLUMNS if name in logs}
            if not known.get("molora/threshold_mean"):  # a method without thresholds
                known.pop("molora/threshold_mean", None)
            numbers = [COLUMNS[name].format(value) for name, value in known.items()]
            self.training_bar.write(f"step {state.global_step:>4}  " + "  ".join(numbers))
