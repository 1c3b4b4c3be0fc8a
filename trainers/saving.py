"""`WholeCheckpointsMixin`: a killed save costs no checkpoint, and a resumed run is the same run."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from accelerate.utils import reduce
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from molora.card.place import CARD_FILE, STAGING, read_card
from molora.card.training import asked_of_card, attached_state, note_training
from molora.config import MoLoraConfig
from molora.trainers.checkpoints import (
    OUR_STATE,
    REPLACED,
    checkpoint_to_resume,
    keep_out_of_rotation,
    make_room,
    put_back_replaced,
    remove,
    warn_of_what_is_not_resumed,
    what_we_saved,
)

logger = logging.getLogger(__name__)


class WholeCheckpointsMixin:
    """A killed save costs a trainer no checkpoint, and a resumed run logs what it would have without a break.

    `train(resume_from_checkpoint=True)` takes the last whole checkpoint. A checkpoint replaces one of the same step
    when it is whole, and no sooner; so does each file of an adapter saved over another. Part of `RoutingLossMixin`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._resumed_from: str | None = None
        self._saves_checkpoint = False
        trainer: Any = self
        trainer.add_callback(_ContinueCallback(trainer))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as the trainer does, from a checkpoint that is whole.

        Args:
            resume_from_checkpoint: `True` for the last whole checkpoint in `output_dir`, or its folder.
            *args: Further arguments of the trainer's own `train`.
            **kwargs: The same.

        Raises:
            MoloraError: If there is no whole checkpoint, or the folder given holds none.
        """
        trainer: Any = self
        output_dir = trainer.args.output_dir
        if resume_from_checkpoint:
            if trainer.args.should_save:
                put_back_replaced(output_dir)
            trainer.accelerator.wait_for_everyone()
        found = checkpoint_to_resume(resume_from_checkpoint, output_dir)
        if found is not None and trainer.is_world_process_zero():
            warn_of_what_is_not_resumed(found, resume_from_checkpoint is True, output_dir)
        self._resumed_from = found
        result = super().train(found, *args, **kwargs)  # type: ignore[misc]  # the trainer this is mixed into
        note_training(self)  # for whoever saves the model himself
        return result

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        trainer: Any = self
        folder = Path(trainer._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.global_step}"
        if trainer.args.should_save:
            make_room(folder)
            if trainer.args.save_total_limit:
                keep_out_of_rotation(folder)
        trainer.accelerator.wait_for_everyone()
        trainer.state.stateful_callbacks[OUR_STATE] = {"args": {}, "attributes": self._state_to_continue()}
        self._saves_checkpoint = True
        try:
            super()._save_checkpoint(model, trial)  # type: ignore[misc]  # the trainer this is mixed into
        finally:
            self._saves_checkpoint = False
        if trainer.args.should_save:
            remove(folder.with_name(REPLACED + folder.name))

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)  # type: ignore[misc]  # the trainer this is mixed into
        trainer: Any = self
        # GRPO and RLOO may train several steps on the same answers, which other weights would not give again.
        answers = getattr(trainer, "_buffered_inputs", None)
        if answers is not None and trainer._step % (trainer.args.steps_per_generation * trainer.num_iterations):
            torch.save({"step": trainer._step, "answers": answers}, self._answers_file(output_dir))
        # Every process saves its own, and the state comes after: it says that all have.
        trainer.accelerator.wait_for_everyone()

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)  # type: ignore[misc]  # the trainer this is mixed into
        trainer: Any = self
        file = self._answers_file(checkpoint) if checkpoint is not None else None
        if file is None or not file.is_file() or not hasattr(trainer, "_buffered_inputs"):
            return
        try:
            saved = torch.load(file, map_location=trainer.args.device, weights_only=True)
        except UnpicklingError:  # raw images
            logger.warning(
                "the answers in %s hold raw images, which cannot be read without running code; the run goes on with "
                "new ones, and is not the same from here",
                file,
            )
            return
        trainer._step, trainer._buffered_inputs = saved["step"], saved["answers"]

    def _answers_file(self, folder: str) -> Path:
        trainer: Any = self
        return Path(folder) / f"answers_{trainer.args.process_index}.pth"

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        trainer: Any = self
        target = Path(output_dir if output_dir is not None else trainer.args.output_dir)
        save: Any = super()._save  # type: ignore[misc]  # the trainer this is mixed into
        if not trainer.args.should_save:
            save(str(target), state_dict=state_dict)
            return
        note_training(self)
        # Inside the target, so that moving is renaming; uploads to the hub leave out what begins so.
        staging = target / STAGING
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        ours = self._stage_card(target / CARD_FILE, staging)
        try:
            save(str(staging), state_dict=state_dict)
            card = staging / CARD_FILE
            # The card comes last: it tells of what lies in the target then.
            for path in sorted((path for path in staging.rglob("*") if path.is_file()), key=lambda path: path == card):
                if path == card:
                    if not ours:
                        continue
                    _update_card(target, state=self._state_for_card(), card=card)
                place = target / path.relative_to(staging)
                place.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, place)
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def _stage_card(self, card: Path, staging: Path) -> bool:
        """Give PEFT the model card that it adds to; one that cannot be read would end the save, and is left alone."""
        if not card.is_file():
            return True
        try:
            read_card(card)
        except ValueError as error:
            logger.warning(
                "the model card %s was left as it is: %s. Correct it, or delete it and save again.", card, error
            )
            return False
        shutil.copy2(card, staging)
        return True

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Bring the model card of `output_dir` up to date; the trainer's own would be written over it.

        TRL asks for it before every checkpoint too. What lies in `output_dir` is no newer then, and nothing is done.

        Args:
            *args: As in the trainer.
            **kwargs: As in the trainer: `license`, `language`, `tags`, `model_name` and `finetuned_from` go into the
                front matter, `dataset_tags` or `dataset_name` as its `datasets`.
        """
        trainer: Any = self
        if not self._has_card():
            super().create_model_card(*args, **kwargs)  # type: ignore[misc]  # the trainer this is mixed into
        elif trainer.is_world_process_zero() and not self._saves_checkpoint:
            _update_card(trainer.args.output_dir, state=self._state_for_card(), **asked_of_card(kwargs))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        trainer: Any = self
        if self._has_card() and trainer.is_world_process_zero():
            place = Path(trainer.args.output_dir) / CARD_FILE
            _update_card(checkpoint_folder, state=self._state_for_card(), card=place)
        super()._push_from_checkpoint(checkpoint_folder)  # type: ignore[misc]  # the trainer this is mixed into

    def _has_card(self) -> bool:
        """Whether the model has an adapter of ours, which alone has a card of ours."""
        trainer: Any = self
        return any(isinstance(config, MoLoraConfig) for config in getattr(trainer.model, "peft_config", {}).values())

    def _state_for_card(self) -> dict[str, Any] | None:
        trainer: Any = self
        configs = list(getattr(trainer.model, "peft_config", {}).values())
        return attached_state(configs[0]) if configs else None

    def _start_anew(self) -> None:
        """Forget what an earlier training of this trainer gathered for its log."""

    def _state_to_continue(self) -> dict[str, Any]:
        """What the log has gathered since its last line, and whether there is more than the model to resume from.

        All processes call it. Values go to JSON.
        """
        trainer: Any = self
        state: dict[str, Any] = {
            "save_only_model": trainer.args.save_only_model,
            "loss": reduce(trainer._tr_loss, reduction="mean").item(),
            "last_logged": trainer._globalstep_last_logged,
        }
        if hasattr(trainer, "_total_train_tokens"):  # TRL's
            state["total_train_tokens"] = trainer._total_train_tokens
        gathered = getattr(trainer, "_metrics", {}).get("train", {})
        state["metrics"] = {name: [float(value) for value in values] for name, values in gathered.items()}
        return state

    def _continue_from(self, state: dict[str, Any]) -> None:
        """Take up what `_state_to_continue` returned when the checkpoint was saved."""
        trainer: Any = self
        trainer._tr_loss += state["loss"]
        trainer._total_loss_scalar -= state["loss"]  # `train_loss` is the mean of this call's steps
        trainer._globalstep_last_logged = state["last_logged"]
        if "total_train_tokens" in state:
            trainer._total_train_tokens = state["total_train_tokens"]
        for name, values in state["metrics"].items():
            trainer._metrics["train"][name].extend(values)


def _update_card(*args: Any, **kwargs: Any) -> None:
    # A card reads what reports read, and they read exports, which train.
    from molora.card.job import update_card

    update_card(*args, **kwargs)


class _ContinueCallback(TrainerCallback):
    """Restores after the trainer has set its counters to nothing, which it does just before training begins."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._start_anew()
        saved = what_we_saved({"stateful_callbacks": state.stateful_callbacks})
        if saved:
            self._trainer._continue_from(saved)
