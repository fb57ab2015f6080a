"""Continued pretraining: plain text in packed rows, of which every token is trained."""

from utils.data.conversations import to_text
from utils.data.encode import build_row_encoder
from utils.data.files import TEXT_SUFFIXES
from utils.data.load_sources import loads_sources
from utils.data.prepare import Data, load_train_and_eval
from utils.data.report import TOO_LONG, Dropped
from utils.data.row_types import PLAIN_TEXT
from utils.tasks.no_effect import NoEffect
from utils.tasks.plain_loss import cross_entropy
from utils.tasks.sft import METRICS, SMOOTHING, build_collator, build_trainer, memory_loss
from utils.tasks.task import Task
from utils.template.tokenize import Segment, encode_segments


@loads_sources
def load_datasets(args, train_args, template, tokenizer) -> Data:
    """Prepares texts: each ends with the tokenizer's EOS token, and all ids are labels.

    The text of a special token is tokenized as plain text, unless `--allow_special_tokens_in_content true`. Packed
    texts share rows of `max_len` tokens; a longer text continues in the next row, and nothing is cut off. Rows of token
    ids are taken as they are, without an EOS token of their own.
    """
    begin, end = _ends(tokenizer)
    split = "" if args.streaming else "; --packing true would split it"
    allow_special = args.allow_special_tokens_in_content

    def encode(texts):
        pieces = [[Segment(text, content=True)] for text in texts]
        encoded = [row["input_ids"] for row in encode_segments(pieces, tokenizer, allow_special)]
        rows = [begin + ids + end for ids in encoded]
        if not train_args.packing:
            return [
                {"input_ids": ids, "labels": ids, "shortened": False}
                if len(ids) <= args.max_len
                else Dropped(f"is too long for --max_len {args.max_len}{split}", TOO_LONG)
                for ids in rows
            ]
        return [{"input_ids": ids, "labels": ids, "shortened": False} for ids in rows]

    key = {"task": "pretrain", "allow_special": allow_special}
    options = {"strategy": "bfd_split", "suffixes": TEXT_SUFFIXES, "all_tokens": True}
    encoder = build_row_encoder(args, train_args, tokenizer, PLAIN_TEXT, to_text, encode, **options, **key)
    return load_train_and_eval(args, train_args, encoder)


def _ends(tokenizer) -> tuple[list[int], list[int]]:
    """The ids before and after each text: BOS if the tokenizer adds one itself, and always EOS."""
    begin = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    if tokenizer("a")["input_ids"][:1] != begin:
        begin = []
    return begin, [tokenizer.eos_token_id]


TASK = Task(
    "pretrain",
    PLAIN_TEXT,
    load_datasets,
    build_trainer,
    build_collator,
    file_suffixes=TEXT_SUFFIXES,
    sample_data=("data/pretrain_data.jsonl", None),
    sample_settings={"allow_special_tokens_in_content": True},  # some of its texts are rendered chats
    metrics=METRICS,
    usual_learning_rates={True: (1e-5, 1e-3), False: (1e-6, 1e-3)},
    uses_template=False,  # the model keeps its chat format
    supports_packing=True,
    supports_padding_free=True,
    packing_splits_rows=True,
    notes_row_losses=True,
    imitates=True,
    settings_without_effect=(
        SMOOTHING,
        NoEffect(
            ("template_name", "thinking", "train_special_tokens"), lambda s: True, "plain text has no chat format"
        ),
        NoEffect(("train_on",), lambda s: True, "every token of a text is trained"),
        NoEffect(("overlong",), lambda s: s.packing, "packed text continues in the next row, so none is too long"),
    ),
    memory_loss=memory_loss,
    plain_loss=cross_entropy,
)
