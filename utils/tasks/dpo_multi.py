"""DPO with TRL's collator, trainer and losses, on pairs of one or more turns."""

from utils.data.collate import build_trl_pair_collator
from utils.data.prepare import Data
from utils.tasks.dpo import pair_task
from utils.tasks.dpo_checks import READ_SMOOTHING, check_losses
from utils.tasks.no_effect import NoEffect


def build_collator(args, train_args, tokenizer):
    """A collator that pads rows, as TRL's loss needs them."""
    return build_trl_pair_collator(tokenizer.pad_token_id)


def build_trainer(args, train_args, model, adapter, data: Data, collator, tokenizer):
    """Builds TRL's DPOTrainer on prepared pairs."""
    from trl import DPOTrainer

    from utils.tasks.dpo_trainer import make_dpo_trainer

    return make_dpo_trainer(DPOTrainer, args, train_args, model, adapter, data, collator, tokenizer)


def memory_loss(model, states, targets, batch):
    """The loss as TRL's DPOTrainer computes it."""
    from utils.memory.fake import chunked_loss

    return chunked_loss(model, states, targets)


TASK = pair_task(
    "dpo_multi",
    build_trainer,
    build_collator,
    check_more=check_losses,
    settings_without_effect=(
        NoEffect(("padding_free",), lambda s: True, "TRL's DPO pads its rows; dpo_single does not need to"),
        NoEffect(("beta",), lambda s: s.loss_type == ["sft"],
                 "--loss_type sft does not use the reference; beta only scales the logged rewards"),
        NoEffect(("label_smoothing",), lambda s: not READ_SMOOTHING & set(s.loss_type),
                 f"only --loss_type {', '.join(sorted(READ_SMOOTHING))} read it",
                 refused={"label_smoothing": 0.0}, flags=("loss_type",)),
    ),
    memory_loss=memory_loss,
)  # fmt: skip
