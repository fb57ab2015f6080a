"""What the tasks share: rows, a validation part, and the recipe as TRL's trainers are to see it."""

import copy
import importlib.metadata
import inspect
import os
from dataclasses import dataclass
from typing import Any

from loguru import logger

from utils.data.cache import tokenizer_key
from utils.data.files import SUFFIXES
from utils.data.prepare import DataReport, RowKind, load_rows
from utils.data.row_types import RowType
from utils.model.adapter_start import adapter_weights, check_new_adapter, settle_trainable
from utils.model.experts import leave_router_logits_out, settle_balance
from utils.model.head import check_head
from utils.model.meta import whole_models
from utils.model.pissa import with_pissa
from utils.patches.lazy_imports import skip_deepspeed_import
from utils.runtime.distributed import uses_fsdp
from utils.runtime.errors import UserError
from utils.train.neftune import add_noise
from utils.train.resume import run_settings

# whose errors are about the hub and the way to it
_HUB = ("huggingface_hub", "httpx", "httpx2", "httpcore", "httpcore2", "requests")


@dataclass
class Data:
    """The prepared rows of a run, with what became of the rest.

    Attributes:
        held_back: how many rows of the training files are for validation (`--val_size`), packed together or not.
    """

    train: Any
    eval: Any
    report: DataReport
    eval_report: DataReport | None = None
    held_back: int = 0

    def rows_trained(self) -> int:
        """How many rows of the files are trained on, packed together or not."""
        return self.report.kept - self.held_back


def row_kind(
    args, train_args, tokenizer, row_type: RowType, read, encode, strategy: str | None = None, suffixes=SUFFIXES, **key
) -> RowKind:
    """What the tasks' ways with rows have in common: lengths, packing, and the cache's key.

    Args:
        row_type: of the task.
        read, encode, suffixes: as in RowKind.
        strategy: TRL's packing strategy, `bfd` for whole rows or `bfd_split` for text that may go on in the next;
            None for rows that cannot be packed.
        **key: what else the rows depend on.
    """

    def pack(dataset):
        from datasets import concatenate_datasets

        if not args.val_size:
            return _packed(dataset, args.max_len, strategy)
        # a row of the files is either trained on or held back, whatever it is packed with
        parts = [_packed(part, args.max_len, strategy) for part in _split_rows(dataset, args.val_size, train_args.seed)]
        marked = [part.map(_mark, batched=True, fn_kwargs={"held": held}) for held, part in enumerate(parts)]
        return concatenate_datasets(marked)

    packing = strategy is not None and getattr(train_args, "packing", False)
    return RowKind(
        suffixes=suffixes,
        read=read,
        encode=encode,
        key={
            "tokenizer": tokenizer_key(tokenizer),
            "max_len": args.max_len,
            "packing": f"{strategy}, TRL {importlib.metadata.version('trl')}" if packing else None,
            "overlong": args.overlong,
            "held_back": (args.val_size, train_args.seed) if packing and args.val_size else None,
            **key,
        },
        columns=row_type.columns,
        pack=pack if packing else None,
        refuse_long=args.overlong == "error",
        unread=row_type.unread,
    )


def _packed(dataset, max_len: int, strategy: str):
    from trl import pack_dataset

    # TRL cuts all columns alike, so each token carries its source until the rows are packed
    carried = dataset.map(_source_of_each_token, batched=True)
    return pack_dataset(carried, max_len, strategy=strategy).map(_each_source_once, batched=True)


_HELD_BACK = "held_back"  # a column of packed rows, [0] of those that are trained on and [1] of those after them


def _mark(batch: dict, held: int) -> dict:
    return {_HELD_BACK: [[held]] * len(batch["input_ids"])}


def _source_of_each_token(batch: dict) -> dict:
    return {"source": [source * len(ids) for source, ids in zip(batch["source"], batch["input_ids"], strict=True)]}


def _each_source_once(batch: dict) -> dict:
    return {"source": [sorted(set(sources)) for sources in batch["source"]]}


def load_both(args, train_args, kind: RowKind) -> Data:
    """Prepares the training rows and the validation rows."""
    if args.train_data_path is None:
        raise UserError("--train_data_path is missing; give data files")
    options = (kind, args.on_bad_row, args.cache_dir, getattr(train_args, "dataset_num_proc", None))
    train, report = load_rows(args.train_data_path, "--train_data_path", *options)
    if args.eval_data_path:
        held_back, eval_report = load_rows(args.eval_data_path, "--eval_data_path", *options)
        return Data(train, held_back, report, eval_report)
    if not args.val_size:
        return Data(train, None, report)
    held_rows = _held_rows(args.val_size, report.kept)
    logger.info("{:,} of {:,} rows are held back for validation", held_rows, report.kept)
    if _HELD_BACK in train.column_names:
        first = sum(mark == [0] for mark in train[_HELD_BACK])
        parts = [train.select(range(first)), train.select(range(first, len(train)))]
        parts = [part.remove_columns(_HELD_BACK) for part in parts]
    else:
        parts = _split_rows(train, args.val_size, train_args.seed)
    return Data(*parts, report, held_back=held_rows)


def _split_rows(dataset, val_size: float, seed: int) -> list:
    """The rows to train on and those to hold back, drawn by the seed."""
    parts = dataset.train_test_split(test_size=_held_rows(val_size, len(dataset)), seed=seed)
    return [parts["train"], parts["test"]]


def _held_rows(val_size: float, rows: int) -> int:
    """How many rows `--val_size` holds back.

    Raises:
        UserError: none is left to train on.
    """
    held = int(val_size) if val_size >= 1 else max(1, round(val_size * rows))
    if held >= rows:
        raise UserError(f"--val_size {val_size} leaves no row to train of {rows}; give a smaller one")
    return held


def for_trl(train_args):
    """The recipe as TRL's trainer is to see it: rows are prepared, packed and collated already."""
    if train_args.deepspeed_plugin is None:
        skip_deepspeed_import()
    settled = copy.copy(train_args)
    if settled.hub_token:
        # the trainer pickles its arguments into every checkpoint, and pushes them; the hub's client reads this instead
        os.environ["HF_TOKEN"] = settled.hub_token
    settled.hub_token = None
    prepared = {"packing": False, "padding_free": False, "max_length": None}
    prepared |= {"dataset_kwargs": {"skip_prepare_dataset": True}}
    for name, value in prepared.items():
        if hasattr(settled, name):  # not every trainer prepares rows
            setattr(settled, name, value)
    settled.remove_unused_columns = False  # the rows hold what the collators take, and no more
    if settled.ddp_find_unused_parameters is None:
        settled.ddp_find_unused_parameters = False  # every trained weight has its part in every step
    return settled


def wants_one_type(args, train_args) -> bool:
    """Whether DeepSpeed or FSDP lays the weights out, which wants all of them in the arithmetic's type."""
    laid_out = train_args.deepspeed_plugin is not None or train_args.fsdp or uses_fsdp()
    return bool(laid_out) and args.precision != "fp32"


def takes_adapter(trainer_class: type) -> bool:
    """Whether a trainer adds the adapter to the model itself, as those of TRL do and transformers' own does not."""
    classes = [kind for kind in trainer_class.__mro__ if "__init__" in vars(kind)]
    return "peft_config" in inspect.signature(classes[0].__init__).parameters


def make_trainer(trainer_class: type, args, train_args, model, adapter, data: Data, collator, tokenizer, **more):
    """Builds one of TRL's trainers on rows that are prepared already.

    Args:
        trainer_class: TRL's or transformers', extended by `utils.train.trainer.FaultTolerantTrainerMixin`.
        args, train_args, model, adapter, data, collator, tokenizer: as in the task modules.
        **more: for the trainer's constructor.

    Raises:
        UserError: the trainer refuses the recipe's values.
    """
    one_type = wants_one_type(args, train_args)
    if adapter is not None and args.init_lora_weights == "pissa":
        model, adapter = with_pissa(model, adapter, one_type), None
    start = adapter_weights(model)
    base_config = copy.deepcopy(model.config)  # before TRL and transformers fit it to the training
    leave_router_logits_out(model, more.get("ref_model"))

    if takes_adapter(trainer_class):
        more["peft_config"] = adapter
    elif adapter is not None:
        from peft import get_peft_model

        model = get_peft_model(model, adapter)

    class Trainer(trainer_class):
        row_type = args.task.row_type

        def settle_weights(self):
            settle_trainable(self.model, one_type, start)

    try:
        trainer = Trainer(
            model=model,
            args=for_trl(train_args),
            train_dataset=data.train,
            eval_dataset=data.eval,
            data_collator=collator,
            processing_class=tokenizer,
            **more,
        )
    except (ValueError, ImportError, NotImplementedError) as error:
        raise UserError(f"the trainer refuses the recipe's values: {error}") from error
    except Exception as error:
        if not train_args.push_to_hub or type(error).__module__.partition(".")[0] not in _HUB:
            raise
        raise UserError(
            f"--push_to_hub true: the hub cannot be used ({type(error).__name__}: {error}); log in and try again, or "
            "leave the flag out"
        ) from error
    trainer.settle_weights()
    add_noise(trainer)
    settle_balance(trainer)
    trainer.base_config = base_config
    with whole_models(train_args):
        if adapter is not None and args.init_lora_weights != "pissa":
            check_new_adapter(trainer.model)
        for each in filter(None, (trainer.model, getattr(trainer, "ref_model", None))):
            check_head(each)
    trainer.on_nan = args.on_nan
    trainer.loraplus_lr_ratio = args.loraplus_lr_ratio
    trainer.save_limit, trainer.args.save_total_limit = train_args.save_total_limit, None
    trainer.settings = run_settings(args, train_args, data)
    trainer.files = data.report.files
    return trainer
