"""What tests of model cards share: names that stand in them, models as from the hub, and how a card is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

from huggingface_hub import ModelCard

HUB = "someone/tiny-llama"
"""A base model as the hub names it."""

WORDS = "Words of the author."
"""What must survive every save."""

TARGETS = ["q_proj", "up_proj"]


def broken(*args: Any, **kwargs: Any) -> NoReturn:
    """Stands in for a function of ours that fails."""
    raise ValueError("broken")


def text_of(folder: Path | str) -> str:
    """The card in a folder."""
    return (Path(folder) / "README.md").read_text(encoding="utf-8")


def front_of(folder: Path | str) -> dict[str, Any]:
    """The front matter of the card in a folder, as the hub's library reads it."""
    return ModelCard.load(Path(folder) / "README.md").data.to_dict()


def on_hub(model: Any, name: str = HUB) -> Any:
    """Let a tiny model think that it was downloaded."""
    model.get_base_model().config._name_or_path = name
    model.get_base_model().name_or_path = name
    for config in model.peft_config.values():
        config.base_model_name_or_path = name
    return model
