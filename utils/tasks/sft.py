"""Supervised fine-tuning: conversations, of which the assistant's answers are trained."""

import dataclasses

from utils.data.collate import build_collator as _collator
from utils.data.conversations import BadRow, to_messages
from utils.data.files import SUFFIXES
from utils.data.truncate import check_all, cut_far, encode_within
from utils.patches.lm_head import use_trained_positions
from utils.runtime.errors import UserError
from utils.tasks.trainer import Data, load_both, make_trainer, row_kind
from utils.train.eval_metrics import TokenWeightedEvalMixin, fill_up
from utils.train.filler import FillLastStepMixin
from utils.train.trainer import FaultTolerantTrainerMixin

USES_TEMPLATE = True


def load_datasets(args, train_args, template, tokenizer) -> Data:
    """Prepares conversations: `input_ids` and `labels`, the answers and their stop tokens labelled."""

    truncate = args.overlong == "truncate"

    def read(row):
        messages = to_messages(row)
        try:
            kept = cut_far(messages, template, tokenizer, args.max_len) if truncate else messages
            check_all(template, kept, messages)
        except UserError as error:
            raise BadRow(str(error.problems[0])) from None
        return kept

    options = {"allow_special": args.allow_special_tokens_in_content, "train_on": args.train_on}

    def encode(conversations):
        return encode_within(conversations, template, tokenizer, args.max_len, truncate, **options)

    key = {"task": "sft", "template": template.key, **options}
    kind = row_kind(args, train_args, tokenizer, "bfd", SUFFIXES, read, encode, **key)
    return load_both(args, train_args, kind)


def build_collator(args, train_args, tokenizer):
    """Rows end to end by default, padded where that is asked for or needed."""
    return _collator(tokenizer.pad_token_id, train_args.padding_free)


def build_trainer(args, train_args, model, adapter, data: Data, collator, tokenizer):
    """TRL's SFTTrainer on rows that are prepared already."""
    from trl import SFTTrainer

    use_trained_positions()

    class Trainer(TokenWeightedEvalMixin, FillLastStepMixin, FaultTolerantTrainerMixin, SFTTrainer):
        pass

    data = dataclasses.replace(data, eval=fill_up(data.eval, train_args))
    return make_trainer(Trainer, args, train_args, model, adapter, data, collator, tokenizer)
