"""Builds a trainer of TRL or transformers on rows that are already prepared; shared by all tasks."""

import copy
import inspect
import os

from utils.data.load_sources import split_sources
from utils.data.prepare import Data
from utils.data.sources import is_mixture
from utils.model.adapter_start import adapter_weights, check_new_adapter, prepare_trainable_weights
from utils.model.experts import leave_router_logits_out, resolve_aux_loss
from utils.model.head import check_head
from utils.model.meta import whole_models
from utils.model.pissa import with_pissa
from utils.patches.lazy_imports import skip_deepspeed_import
from utils.runtime.distributed import uses_fsdp
from utils.runtime.errors import UserError
from utils.train.neftune import add_noise
from utils.train.resume import run_settings
from utils.train.row_ledger import LedgerNote, RowLedger

# errors of these packages come from the Hub or the connection to it
_HUB = ("huggingface_hub", "httpx", "httpx2", "httpcore", "httpcore2", "requests")


def for_trl(train_args):
    """Returns a copy of the recipe for TRL's trainer, which must not prepare, pack or truncate the rows again."""
    if train_args.deepspeed_plugin is None:
        skip_deepspeed_import()
    copied = copy.copy(train_args)
    if copied.hub_token:
        # the trainer pickles its arguments into every checkpoint and pushes them; the Hub's client reads this variable
        os.environ["HF_TOKEN"] = copied.hub_token
    copied.hub_token = None
    prepared = {"packing": False, "padding_free": False, "max_length": None}
    prepared |= {"dataset_kwargs": {"skip_prepare_dataset": True}}
    for name, value in prepared.items():
        if hasattr(copied, name):  # not every trainer prepares rows
            setattr(copied, name, value)
    copied.remove_unused_columns = False  # the rows hold only columns that the collators read
    if copied.ddp_find_unused_parameters is None:
        copied.ddp_find_unused_parameters = False  # every trained weight gets a gradient in every step
    return copied


def needs_uniform_dtype(args, train_args) -> bool:
    """Whether all weights need the dtype of the computation, as DeepSpeed and FSDP require when they shard them."""
    sharded = train_args.deepspeed_plugin is not None or train_args.fsdp or uses_fsdp()
    return bool(sharded) and args.precision != "fp32"


def takes_adapter(trainer_class: type) -> bool:
    """Whether a trainer's constructor adds the adapter, as TRL's trainers do; transformers' Trainer does not."""
    classes = [kind for kind in trainer_class.__mro__ if "__init__" in vars(kind)]
    return "peft_config" in inspect.signature(classes[0].__init__).parameters


def make_trainer(trainer_class: type, args, train_args, model, adapter, data: Data, collator, tokenizer, **more):
    """Builds a trainer on prepared rows.

    Args:
        trainer_class: TRL's or transformers', extended by `utils.train.trainer.FaultTolerantTrainerMixin`.
        args, train_args, model, adapter, data, collator, tokenizer: as for a task's `build_trainer`.
        **more: further arguments of the trainer's constructor.

    Raises:
        UserError: the trainer refuses the recipe's values.
    """
    keep_dtype = needs_uniform_dtype(args, train_args)
    if adapter is not None and args.init_lora_weights == "pissa":
        model, adapter = with_pissa(model, adapter, keep_dtype), None
    start = adapter_weights(model)
    base_config = copy.deepcopy(model.config)  # before TRL and transformers change it for the training
    leave_router_logits_out(model, more.get("ref_model"))
    if takes_adapter(trainer_class):
        more["peft_config"] = adapter
    elif adapter is not None:
        from peft import get_peft_model

        model = get_peft_model(model, adapter)

    class Trainer(*_mix_ins(data), trainer_class):
        row_type = args.task.row_type

        def prepare_weights(self):
            prepare_trainable_weights(self.model, keep_dtype, start)

    trainer = _construct(Trainer, train_args, model, data, data_collator=collator, processing_class=tokenizer, **more)
    if data.stream is not None:  # TRL 1.16's constructor takes only a `datasets.Dataset`: the first rows
        trainer.stream = data.stream
    trainer.order = data.order
    trainer.prepare_weights()
    add_noise(trainer)
    resolve_aux_loss(trainer)
    with whole_models(train_args):
        if adapter is not None:
            check_new_adapter(trainer.model)
        for built in filter(None, (trainer.model, getattr(trainer, "ref_model", None))):
            check_head(built)
    trainer.base_config = base_config
    _set_checkpoint_options(trainer, args, train_args, data)
    return trainer


def _mix_ins(data: Data) -> tuple[type, ...]:
    """The classes that every task's trainer is extended by for these rows."""
    if data.stream is not None:
        from utils.train.stream import StreamMixin  # imports torch

        return (StreamMixin,)
    if data.order is not None:
        from utils.train.order import OrderMixin  # imports torch

        return (OrderMixin,)
    return ()


def _construct(trainer_class: type, train_args, model, data: Data, **options):
    """Calls the trainer's constructor; its errors about values, packages and the Hub become a UserError."""
    try:
        return trainer_class(
            model=model, args=for_trl(train_args), train_dataset=data.train, eval_dataset=data.eval, **options
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


def _set_checkpoint_options(trainer, args, train_args, data: Data) -> None:
    """Sets what `FaultTolerantTrainerMixin` reads: NaN handling, the optimizer, and what each checkpoint stores."""
    trainer.on_nan = args.on_nan
    for name in ("loraplus_lr_ratio", "layerwise_lr_decay", "use_muon"):
        setattr(trainer, name, getattr(args, name))
    # the mix-in deletes old checkpoints: transformers 5.23 would delete complete ones at the end of the training too
    trainer.save_limit, trainer.args.save_total_limit = train_args.save_total_limit, None
    trainer.settings = run_settings(args, train_args, data)
    trainer.files = data.report.files
    trainer.source_names, trainer.eval_source_names = data.source_names, data.eval_source_names
    if args.row_ledger:
        trainer.ledger = RowLedger(_ledger_note(args, data))


def _ledger_note(args, data: Data) -> LedgerNote:
    """What the losses of this run's row ledger belong to."""
    report = data.report
    hashes = [report.hashes[file] for file in report.files]
    names = list(data.source_names or report.files)
    columns = {source.name: alone.columns for source, alone in split_sources(args)} if is_mixture(args) else {}
    columns = [columns.get(name, args.columns) for name in names]
    return LedgerNote(files=list(report.files), sha256=hashes, sources=names, file_columns=columns)
