"""Supervised fine-tuning: trains the assistant's answers in conversations."""

import dataclasses

from utils.data.bad_rows import BadRow
from utils.data.collate import build_collator as _collator
from utils.data.conversations import to_messages
from utils.data.encode import build_row_encoder
from utils.data.load_sources import loads_sources
from utils.data.prepare import Data, load_train_and_eval
from utils.data.row_types import CONVERSATION
from utils.data.truncate import check_all, cut_far, encode_within
from utils.runtime.errors import UserError
from utils.tasks.no_effect import NoEffect
from utils.tasks.plain_loss import cross_entropy
from utils.tasks.task import Task
from utils.tasks.trainer import make_trainer
from utils.template.messages import UNTRAINED_ANSWER, without_marks
from utils.train.token_losses import check_weighted_loss


@loads_sources
def load_datasets(args, train_args, template, tokenizer) -> Data:
    """Prepares conversations as `input_ids` and `labels`; answers and their stop tokens are labelled."""
    truncate = args.overlong == "truncate"

    def read(row):
        messages = to_messages(row)
        try:
            kept = cut_far(messages, template, tokenizer, args.max_len) if truncate else messages
            check_all(template, kept, messages)
            if args.train_on == "prompt":
                _check_answers_located(template, kept)
        except UserError as error:
            raise BadRow(str(error.problems[0])) from None
        return kept

    options = {"allow_special": args.allow_special_tokens_in_content, "train_on": args.train_on}

    def encode(conversations):
        return encode_within(conversations, template, tokenizer, args.max_len, truncate, **options)

    key = {"task": "sft", "template": template.key, **options}
    how = {"strategy": "bfd", "all_tokens": args.train_on == "prompt"}
    encoder = build_row_encoder(args, train_args, tokenizer, CONVERSATION, read, encode, **how, **key)
    data = load_train_and_eval(args, train_args, encoder)
    if "loss_weights" in getattr(data.train, "column_names", ()):  # of streamed rows it is not known yet
        check_weighted_loss(train_args)
    return data


def _check_answers_located(template, messages: list) -> None:
    """Refuses a conversation with an answer that would not be trained alone: its tokens are not told from the rest."""
    for note in template.notes(without_marks(messages)):
        if note.kind == UNTRAINED_ANSWER:
            raise BadRow(f"{note.reason}, and --train_on prompt cannot leave it out; use --train_on all_turns")


def build_collator(args, train_args, tokenizer):
    """A collator that concatenates rows (`--padding_free true`) or pads them."""
    return _collator(tokenizer.pad_token_id, train_args.padding_free)


def build_trainer(args, train_args, model, adapter, data: Data, collator, tokenizer):
    """Builds TRL's SFTTrainer on prepared rows."""
    from trl import SFTTrainer

    from utils.patches.lm_head import use_trained_positions
    from utils.train.eval_metrics import TokenWeightedEvalMixin, fill_up
    from utils.train.filler import FillLastStepMixin
    from utils.train.row_losses import RowLossesMixin
    from utils.train.token_losses import TokenLossMixin
    from utils.train.trainer import FaultTolerantTrainerMixin

    use_trained_positions()

    class Trainer(
        RowLossesMixin,
        TokenWeightedEvalMixin,
        TokenLossMixin,
        FillLastStepMixin,
        FaultTolerantTrainerMixin,
        SFTTrainer,
    ):
        pass

    data = dataclasses.replace(data, eval=fill_up(data.eval, train_args, TASK.row_type))
    return make_trainer(Trainer, args, train_args, model, adapter, data, collator, tokenizer)


def memory_loss(model, states, targets, batch):
    """The loss as SFT computes it: in chunks, or by `utils.patches.lm_head` on the CPU if the head is frozen."""
    from utils.memory.fake import chunked_loss, frozen_head_loss

    frozen = not model.get_output_embeddings().weight.requires_grad
    return (frozen_head_loss if frozen and not batch.on_gpu else chunked_loss)(model, states, targets)


METRICS = {"loss": False, "perplexity": False, "token_accuracy": True}
SMOOTHING = NoEffect(("label_smoothing_factor",), lambda s: s.loss_type == "dft", "--loss_type dft has no smoothing")
TASK = Task(
    "sft",
    CONVERSATION,
    load_datasets,
    build_trainer,
    build_collator,
    sample_data=("data/sft_data.jsonl", "data/sft_eval_data.jsonl"),
    metrics=METRICS,
    usual_learning_rates={True: (1e-5, 1e-3), False: (5e-7, 1e-4)},
    supports_packing=True,
    supports_padding_free=True,
    notes_row_losses=True,
    imitates=True,
    settings_without_effect=(SMOOTHING,),
    memory_loss=memory_loss,
    plain_loss=cross_entropy,
)
