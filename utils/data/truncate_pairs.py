"""Preference pairs → token ids within the lengths: the prompt gives way, an answer is never cut."""

from utils.data.pairs import EqualPair, Pair
from utils.data.report import TOO_LONG, Dropped
from utils.data.truncate import SYSTEM_STAYS, Shortened, can_move_system, count_tokens, first_fit, is_far, shorter
from utils.template import Template
from utils.template.messages import count_answers
from utils.template.tokenize import IGNORED

_SIDES = ("chosen", "rejected")
COLUMNS = ("prompt_ids", "chosen_ids", "chosen_labels", "rejected_ids", "rejected_labels")


def encode_pairs_within(
    pairs: list[Pair],
    template: Template,
    tokenizer,
    max_len: int,
    max_prompt_length: int,
    truncate: bool = True,
    allow_special: bool = False,
) -> list[dict | Dropped]:
    """Encodes pairs so that no prompt and no prompt with its answer is too long.

    Args:
        pairs: from `to_pair`, which the template can hold; the prompts of `cut_pair_far` count as shortened.
        template: renders them, exactly as for SFT.
        tokenizer: a fast one.
        max_len: tokens of the prompt and the longer answer.
        max_prompt_length: tokens of the prompt, the opening of the answer included.
        truncate: whether a longer prompt is shortened rather than the pair left out.
        allow_special: as in `Template.encode`.

    Returns:
        for each the columns of `COLUMNS` and `shortened`, or why the pair cannot be trained.
    """

    def surplus(row: dict) -> int:
        answer = max(len(row["chosen_ids"]), len(row["rejected_ids"]))
        return max(len(row["prompt_ids"]) - max_prompt_length, len(row["prompt_ids"]) + answer - max_len)

    def fit(pair: Pair, row: dict | Dropped) -> dict | Dropped:
        shortened = isinstance(pair["prompt"], Shortened)
        limits = f"--max_len {max_len} and --max_prompt_length {max_prompt_length}"
        while not isinstance(row, Dropped) and (too_many := surplus(row)) > 0:
            if not truncate:
                return Dropped(f"is too long for {limits}", TOO_LONG)
            longer = [*pair["prompt"], pair["chosen"][0]]
            kept = shorter(longer, too_many, tokenizer)
            if kept is None:
                return Dropped(f"is too long for {limits} with its answers, which are never cut", TOO_LONG)
            if not can_move_system(template, longer, kept):
                return Dropped(f"is too long for {limits} and {SYSTEM_STAYS}", TOO_LONG)
            pair, shortened = {**pair, "prompt": kept[:-1]}, True
            row = _encode([pair], template, tokenizer, allow_special)[0]
        if isinstance(row, Dropped):
            return row
        # every answer of a pair is trained; fields that are not read are named
        notes = template.notes(pair["prompt"] + pair["chosen"], train_on=count_answers(pair["chosen"]))
        return {**row, "shortened": shortened, "notes": notes}

    return [fit(*both) for both in zip(pairs, _encode(pairs, template, tokenizer, allow_special), strict=True)]


_SLACK = 16  # tokens by which a rendering may be counted longer than what the pair is made of


def cut_pair_far(pair: Pair, template: Template, tokenizer, max_len: int, max_prompt_length: int) -> Pair:
    """As `cut_far`, for the prompt of a pair: no turn is dropped that `encode_pairs_within` would keep."""
    if not is_far(pair["prompt"], min(max_len, max_prompt_length)):
        return pair

    def too_long(asked: list) -> bool:
        for side in _SIDES:
            turns = [*asked[:-1], *pair[side]]
            tokens = count_tokens(template.render(turns), tokenizer) - _SLACK
            answer = count_tokens(pair[side][0]["content"], tokenizer)
            if tokens > max_len or (len(pair[side]) == 1 and tokens - answer > max_prompt_length):
                return True
        return False

    asked = first_fit([*pair["prompt"], pair["chosen"][0]], too_long)
    return {**pair, "prompt": Shortened(asked[:-1])} if isinstance(asked, Shortened) else pair


def _encode(pairs: list[Pair], template: Template, tokenizer, allow_special: bool) -> list[dict | Dropped]:
    """Each conversation in one tokenisation, only the answers after the prompt labelled."""
    sides = [(pair["prompt"] + pair[side], count_answers(pair[side])) for pair in pairs for side in _SIDES]
    encoded: list[dict] = [{}] * len(sides)
    for answers in {count for _, count in sides}:
        places = [place for place, (_, count) in enumerate(sides) if count == answers]
        conversations = [sides[place][0] for place in places]
        rows = template.encode_batch(conversations, tokenizer, allow_special, train_on=answers)
        for place, row in zip(places, rows, strict=True):
            encoded[place] = row
    return [_joined(*both) for both in zip(encoded[::2], encoded[1::2], strict=True)]


def _joined(chosen: dict, rejected: dict) -> dict | Dropped:
    """Two encoded conversations → the ids they share, and what each goes on with up to its last label.

    What stands after the last stop token, a line feed say, no trained token sees.
    """
    trained = [[i for i, label in enumerate(row["labels"]) if label != IGNORED] for row in (chosen, rejected)]
    if not all(trained):
        return Dropped("has nothing to train")
    start = 0
    first = min(trained[0][0], trained[1][0])
    while start < first and chosen["input_ids"][start] == rejected["input_ids"][start]:
        start += 1
    joined = {"prompt_ids": chosen["input_ids"][:start]}
    for side, row, places in zip(_SIDES, (chosen, rejected), trained, strict=True):
        joined[f"{side}_ids"] = row["input_ids"][start : places[-1] + 1]
        joined[f"{side}_labels"] = row["labels"][start : places[-1] + 1]
    if joined["chosen_ids"] == joined["rejected_ids"]:
        return Dropped("has chosen equal to rejected in the template's form", EqualPair.kind)
    return joined
