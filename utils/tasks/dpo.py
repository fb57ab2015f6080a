"""What both modes of DPO share: the preparation of pairs, and the attributes of their tasks."""

from collections.abc import Callable

from utils.data.bad_rows import BadRow
from utils.data.encode import build_row_encoder
from utils.data.load_sources import loads_sources
from utils.data.pairs import Pair, to_pair
from utils.data.prepare import Data, load_train_and_eval
from utils.data.row_types import PAIR
from utils.data.truncate import cut_pair_far, encode_pairs_within
from utils.runtime.errors import Problem, UserError
from utils.tasks.dpo_checks import NO_EFFECT, check_dpo
from utils.tasks.no_effect import refuse_without_effect
from utils.tasks.plain_loss import preference
from utils.tasks.task import Task, no_problems
from utils.template.messages import UNTRAINED_ANSWER, count_answers


@loads_sources
def load_datasets(args, train_args, template, tokenizer) -> Data:
    """Prepares pairs as `prompt_ids`, and `…_ids` and `…_labels` of both answers."""

    def read(row) -> Pair:
        pair = to_pair(row)
        if truncate:
            pair = cut_pair_far(pair, template, tokenizer, args.max_len, args.max_prompt_length)
        for side in ("chosen", "rejected"):
            _check_answers(template, pair["prompt"] + pair[side], count_answers(pair[side]))
        return pair

    truncate = args.overlong == "truncate"
    lengths = {"max_prompt_length": args.max_prompt_length, "allow_special": args.allow_special_tokens_in_content}

    def encode(pairs: list[Pair]):
        return encode_pairs_within(pairs, template, tokenizer, args.max_len, truncate=truncate, **lengths)

    key = {"task": "dpo", "template": template.key, **lengths}
    encoder = build_row_encoder(args, train_args, tokenizer, PAIR, read, encode, **key)
    return load_train_and_eval(args, train_args, encoder)


def _check_answers(template, messages: list[dict], answers: int) -> None:
    """Refuses a conversation that the template cannot render, or of whose answers it leaves a part out."""
    try:
        template.check(messages)
        for note in template.notes(messages, train_on=answers):
            if note.kind == UNTRAINED_ANSWER:
                raise UserError(f"{note.reason}; both answers of a pair must be trained completely")
    except UserError as error:
        raise BadRow(str(error.problems[0])) from None


def pair_task(
    name: str, build_trainer: Callable, build_collator: Callable, check_more: Callable = no_problems, **more
) -> Task:
    """Builds the `Task` of a mode of DPO.

    Args:
        name, build_trainer, build_collator: as in `Task`.
        check_more: checks of this mode only, as `check` in `Task`.
        **more: further attributes; `settings_without_effect` are added to those that both modes share.
    """
    table = (*NO_EFFECT, *more.pop("settings_without_effect", ()))

    def check(common, train_args) -> list[Problem]:
        problems = check_dpo(common, train_args) + refuse_without_effect(table, common, train_args)
        return problems + check_more(common, train_args)

    return Task(
        name,
        PAIR,
        load_datasets,
        build_trainer,
        build_collator,
        family="dpo",
        sample_data=(f"data/{name}_data.jsonl", f"data/{name}_eval_data.jsonl"),
        metrics={"loss": False, "rewards/accuracies": True, "rewards/margins": True, "rewards/chosen": True},
        usual_learning_rates={True: (2e-7, 2e-4), False: (2e-8, 1e-5)},
        needs_reference=True,
        settings_without_effect=table,
        plain_loss=preference,
        check=check,
        **more,
    )
