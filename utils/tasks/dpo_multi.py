"""DPO by TRL: its collator, its trainer and all its losses, on pairs of one turn or many."""

from utils.data.collate import build_trl_pair_collator
from utils.tasks.dpo import load_datasets, make_dpo_trainer
from utils.tasks.trainer import Data

__all__ = ["USES_TEMPLATE", "build_collator", "build_trainer", "load_datasets"]

USES_TEMPLATE = True


def build_collator(args, train_args, tokenizer):
    """Padded rows, the form that TRL's loss takes."""
    return build_trl_pair_collator(tokenizer.pad_token_id)


def build_trainer(args, train_args, model, adapter, data: Data, collator, tokenizer):
    """TRL's DPOTrainer on pairs that are prepared already."""
    from trl import DPOTrainer

    return make_dpo_trainer(DPOTrainer, args, train_args, model, adapter, data, collator, tokenizer)
