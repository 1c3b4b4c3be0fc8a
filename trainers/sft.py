"""TRL's supervised fine-tuning trainer with routing losses."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset, IterableDataset
from trl import SFTTrainer, pack_dataset
from trl.data_utils import get_dataset_column_names

from molora.errors import MoloraError
from molora.trainers.columns import COLUMNS, is_per_token
from molora.trainers.mixin import RoutingLossMixin
from molora.trainers.packing import refuse_packed_sequences


class MoLoraSFTTrainer(RoutingLossMixin, SFTTrainer):
    """`trl.SFTTrainer`, unchanged, plus the routing losses of the adapter's config.

    Takes the same arguments; pass `peft_config=MoLoraConfig(...)` or an adapted model. With packing, the routing
    columns of the dataset are packed too.

    Raises:
        MoloraError: If rows are to hold several examples and the adapter decides about whole rows, or if columns shall
            go with `packing_strategy="wrapped"`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.padding_free or self.args.packing or self.args.eval_packing:
            refuse_packed_sequences(self.model)

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, formatting_func: Any, dataset_name: str
    ) -> Any:
        names = [name for name in COLUMNS if name in get_dataset_column_names(dataset)] if packing else []
        if names and args.packing_strategy == "wrapped":
            raise MoloraError(
                f"packing_strategy='wrapped' cuts examples anywhere, so the column {', '.join(names)} would belong to "
                "no row. Use packing_strategy='bfd' or 'bfd_split', or remove the column."
            )
        if not names or args.max_length is None:
            return super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)
        # TRL packs tokens and labels and drops all else. So it prepares the rows whole and in their order, and they
        # are packed here.
        whole = copy.copy(args)
        whole.max_length, whole.shuffle_dataset = None, False
        dataset = super()._prepare_dataset(dataset, processing_class, whole, False, formatting_func, dataset_name)
        return _packed(dataset, names, args, dataset_name)


def _packed(
    dataset: Dataset | IterableDataset, names: Sequence[str], args: Any, what: str
) -> Dataset | IterableDataset:
    """Pack tokenized rows as TRL does, with routing columns, which have a value per token then."""
    known = isinstance(dataset, Dataset)  # an iterable one is mapped as it goes
    options = {"num_proc": args.dataset_num_proc, "desc": f"Packing {what} dataset"} if known else {}
    with args.main_process_first(local=False, desc="packing"):
        dataset = dataset.select_columns(["input_ids", "labels", *names])
        dataset = dataset.map(_one_per_token, fn_kwargs={"names": names}, **options)
        if args.shuffle_dataset:  # before packing and after, as TRL
            dataset = dataset.shuffle(seed=args.seed)
        dataset = pack_dataset(dataset, args.max_length, args.packing_strategy, options)
    return dataset.shuffle(seed=args.seed) if args.shuffle_dataset else dataset


def _one_per_token(row: Mapping[str, Any], names: Sequence[str]) -> dict[str, list[Any]]:
    length, spread = len(row["input_ids"]), {}
    for name in names:
        values = list(row[name]) if is_per_token(name, row[name]) else [row[name]] * length
        if len(values) != length:
            raise MoloraError(
                f"the {name} column has {len(values)} values in a row of {length} tokens; give one each."
            )
        spread[name] = values
    return spread
