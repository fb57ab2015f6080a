"""Rows that are token ids already: checked and trained as they are, without template and tokenizer."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from utils.data.bad_rows import BadRow
from utils.data.formats import is_empty
from utils.data.report import TOO_LONG, Dropped
from utils.template.tokenize import IGNORE_INDEX

_MASKS = ("completion_mask", "assistant_masks")  # TRL's and transformers' names: 1 for tokens that are trained
TOKEN_FIELDS = ("input_ids", "labels", "attention_mask", *_MASKS)
# fields of tokens whose values would matter, and are not read
_REFUSED = ("position_ids", "seq_lengths", "loss_weights", "inputs_embeds")


class TokenRow(NamedTuple):
    """A row of token ids.

    Attributes:
        input_ids: [L], without padding.
        labels: [L], -100 where nothing is trained; None if the row does not say.
    """

    input_ids: list[int]
    labels: list[int] | None


def is_token_row(row: Any) -> bool:
    """Whether a raw row holds token ids."""
    return isinstance(row, dict) and not is_empty(row.get("input_ids"))


def read_token_row(row: dict) -> TokenRow:
    """Reads token ids and which of them are trained.

    `{"input_ids": [5, 6, 0], "labels": [-100, 6, -100], "attention_mask": [1, 1, 0]}` → `TokenRow([5, 6], [-100, 6])`

    Raises:
        BadRow: a list is malformed, or of another length; or a field is not supported.
    """
    for name in _REFUSED:
        if not is_empty(row.get(name)):
            raise BadRow(f"has {name!r} beside 'input_ids', which is not read; remove it")
    ids = _integers(row, "input_ids")
    given = [name for name in ("labels", *_MASKS) if not is_empty(row.get(name))]
    if len(given) > 1:
        raise BadRow(f"has {given[0]!r} and {given[1]!r}; keep one of them")
    labels = _integers(row, given[0]) if given else None
    is_masked = not is_empty(row.get("attention_mask"))
    kept = _without_padding(_integers(row, "attention_mask")) if is_masked else slice(None)
    for name in (*given, "attention_mask"):
        if not is_empty(row.get(name)) and len(row[name]) != len(ids):
            raise BadRow(f"has {len(row[name]):,} values in {name!r} and {len(ids):,} in 'input_ids'")
    if given and given[0] in _MASKS:
        labels = [token if mask else IGNORE_INDEX for token, mask in zip(ids, labels, strict=True)]
    ids, labels = ids[kept], labels and labels[kept]
    if not ids:
        raise BadRow("has an 'attention_mask' of zeros")
    if labels is not None and (wrong := _other_labels(ids, labels)) is not None:
        shifted = labels[:-1] == ids[1:] or _other_labels(ids[1:], labels[:-1]) is None
        hint = "; write the label of the same place, not of the next one" if shifted else ""
        raise BadRow(f"has label {labels[wrong]} where the token is {ids[wrong]}: a label is its token or -100{hint}")
    return TokenRow(ids, labels)


def _integers(row: dict, name: str) -> list[int]:
    values = row[name]
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise BadRow(f"has in {name!r} something other than a list of whole numbers")
    return values


def _without_padding(mask: list[int]) -> slice:
    """The tokens that a mask keeps: `[0, 1, 1, 0]` → `slice(1, 3)`."""
    if set(mask) - {0, 1}:
        raise BadRow("has an 'attention_mask' with other values than 0 and 1")
    start, end = mask.index(1) if 1 in mask else 0, len(mask) - mask[::-1].index(1) if 1 in mask else 0
    if 0 in mask[start:end]:
        raise BadRow("has a 0 in its 'attention_mask' between tokens; only padding at the ends can be removed")
    return slice(start, end)


def _other_labels(ids: list[int], labels: list[int]) -> int | None:
    """The first place with a label that is neither its token nor -100."""
    pairs = enumerate(zip(ids, labels, strict=True))
    return next((place for place, (token, label) in pairs if label not in (token, IGNORE_INDEX)), None)


def with_token_rows(read: Callable[[Any], Any], check: Callable[[TokenRow], TokenRow] = lambda row: row):
    """A function that reads raw rows of either kind.

    Args:
        read: of rows without token ids.
        check: called with each TokenRow, which it may complete; raises BadRow.
    """
    return lambda row: check(read_token_row(row)) if is_token_row(row) else read(row)


def labelled_by(tokenizer, all_tokens: bool) -> Callable[[TokenRow], TokenRow]:
    """A function that checks the ids of a TokenRow and gives it labels.

    Args:
        tokenizer: the model's.
        all_tokens: whether all tokens of a row without labels are trained; it is refused otherwise.
    """

    @functools.cache
    def largest() -> int:
        return max(tokenizer.get_vocab().values())  # takes a tenth of a second, which rows of text do not need

    def check(row: TokenRow) -> TokenRow:
        outside = next((token for token in row.input_ids if not 0 <= token <= largest()), None)
        if outside is not None:
            raise BadRow(f"has the id {outside}, and those of the model's tokenizer are 0 to {largest()}")
        if row.labels is None and not all_tokens:
            raise BadRow(
                "has 'input_ids' without 'labels'; add them, with -100 where nothing is trained, or pass --train_on "
                "prompt, which trains all tokens"
            )
        return row if row.labels is not None else TokenRow(row.input_ids, row.input_ids)

    return check


def with_token_encoding(encode: Callable[[list], list], max_len: int | None) -> Callable[[list], list[dict | Dropped]]:
    """A function that encodes what `with_token_rows` returns, by `encode` where it is not a TokenRow.

    Args:
        encode: of the other rows.
        max_len: a longer TokenRow is dropped; None to keep it, as packing continues it in the next row.
    """

    def encode_tokens(row: TokenRow) -> dict | Dropped:
        if all(label == IGNORE_INDEX for label in row.labels[1:]):  # the first token is never predicted
            return Dropped("has nothing to train")
        if max_len is not None and len(row.input_ids) > max_len:
            return Dropped(f"is too long for --max_len {max_len}; a row of token ids is never cut", TOO_LONG)
        return {"input_ids": row.input_ids, "labels": row.labels, "shortened": False, "is_ids": True}

    def encode_all(rows: list) -> list[dict | Dropped]:
        others = [row for row in rows if not isinstance(row, TokenRow)]
        encoded = iter(encode(others) if others else [])
        return [encode_tokens(row) if isinstance(row, TokenRow) else next(encoded) for row in rows]

    return encode_all
