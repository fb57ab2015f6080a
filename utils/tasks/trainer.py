"""What the tasks share: rows, a validation part, and the recipe as TRL's trainers are to see it."""

import copy
import inspect
import os

from utils.data.prepare import Data
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
