"""RowType: how a type of rows is read, which texts it has, and the columns it becomes when it is prepared.

A task names its row type (`utils/tasks/task.py`). Code that handles prepared rows asks the row type for their
sequences of tokens and knows no column by its name, so a new row type is described in `row_types.py`, or in the file
of a new task, and nowhere else:

    LABELLED = RowType(
        "labelled answer",
        read=to_labelled_answer,
        texts=lambda row: Texts([row["prompt"]], [row["completion"]]),
        fields_read=lambda row: ("prompt", "completion", "label", "tags"),
        columns={"input_ids": IDS, "labels": LABELS, "label": BOOL, "tags": TEXTS},
        sequence_columns=(SequenceColumns("", ("input_ids",), "labels"),),
    )
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from utils.data.columns import rename_fields, with_columns
from utils.data.fields import unread_fields
from utils.template.tokenize import IGNORE_INDEX

# kinds of columns of a prepared row: token ids, labels (-100 where nothing is trained), the weight of each token's loss
# (null where all are 1; rows without other weights have no such column), and single or listed values
IDS, LABELS, WEIGHTS, BOOL, FLOAT, TEXT, TEXTS = "ids", "labels", "weights", "bool", "float", "text", "texts"
_ANY_VALUE: dict[str, Any] = {BOOL: True, FLOAT: 1.0, TEXT: "", TEXTS: []}
_PROMPT_OF_EXAMPLE = 4  # tokens


def arrow_type(kind: str):
    """The Arrow type of a kind of column."""
    import pyarrow

    return {
        IDS: pyarrow.list_(pyarrow.int32()),
        LABELS: pyarrow.list_(pyarrow.int32()),
        WEIGHTS: pyarrow.list_(pyarrow.float32()),
        BOOL: pyarrow.bool_(),
        FLOAT: pyarrow.float64(),
        TEXT: pyarrow.string(),
        TEXTS: pyarrow.list_(pyarrow.string()),
    }[kind]


class Texts(NamedTuple):
    """The texts of a row: those of the question, and those of each answer."""

    question: list[str]
    answers: list[str]


class SequenceColumns(NamedTuple):
    """The columns of a prepared row that make up one sequence of tokens.

    Attributes:
        name: tells the sequences of a row apart; empty where there is one.
        ids: columns of token ids, which are concatenated.
        labels: the column with the labels of the last of them; tokens before it have none.
    """

    name: str
    ids: tuple[str, ...]
    labels: str


class Sequence(NamedTuple):
    """One sequence of tokens that a prepared row is trained as.

    Attributes:
        name: as in `SequenceColumns`.
        input_ids: [tokens].
        labels: [tokens], -100 where nothing is trained.
        prompt_length: how many tokens come from the columns before the last.
        weights: [tokens], of each token's loss; None where all are 1.
    """

    name: str
    input_ids: list[int]
    labels: list[int]
    prompt_length: int
    weights: list[float] | None = None


def _copy_of_no_file(first: dict) -> dict:
    return {**first, "source": []}


@dataclass(frozen=True)
class RowType:
    """A type of rows, from a file's raw row to the sequences of tokens that are trained.

    Attributes:
        name: for messages, such as "preference pair".
        read: raw row → what the task encodes; raises `BadRow` or `EmptyRow`.
        texts: what `read` returned → its texts.
        fields_read: raw row → the names of the fields that `read` looks at.
        columns: name → kind of each column of a prepared row, `source` left out.
        sequence_columns: the sequences of a prepared row.
        token_counts: (what `read` returned, template or None, tokenizer) → tokens of the longest sequence and of the
            prompt, before any truncation.
        known_fields: all that `fields_read` may return, to find misspelt names in `--columns`; empty if unknown.
        filler: the first prepared row → a row that only fills up a step on several processes. Its `source` is empty;
            a trainer must not count it. By default a copy of the first row.
        compares_answers: whether the sequences are answers to one prompt, compared with each other.
        has_prompt_limit: whether `--max_prompt_length` applies.
    """

    name: str
    read: Callable[[Any], Any]
    texts: Callable[[Any], Texts]
    fields_read: Callable[[dict], Collection[str]]
    columns: dict[str, str]
    sequence_columns: tuple[SequenceColumns, ...]
    token_counts: Callable[[Any, Any, Any], tuple[int, int]] | None = None
    known_fields: frozenset[str] = frozenset()
    filler: Callable[[dict], dict] = _copy_of_no_file
    compares_answers: bool = False
    has_prompt_limit: bool = False

    def sequences(self, row: dict) -> list[Sequence]:
        """The sequences that a prepared row is trained as.

        `{"input_ids": [1, 2], "labels": [-100, 2]}` → one; a preference pair → prompt + chosen, prompt + rejected.
        """
        found = []
        for name, columns, labels in self.sequence_columns:
            ids = [token for column in columns for token in row[column]]
            prompt = len(ids) - len(row[columns[-1]])
            start = len(ids) - len(row[labels])
            weights = next((row.get(column) for column, kind in self.columns.items() if kind == WEIGHTS), None)
            found.append(Sequence(name, ids, [IGNORE_INDEX] * start + list(row[labels]), prompt, weights))
        return found

    def length(self, row: dict) -> int:
        """Tokens of the longest sequence of a prepared row."""
        return max(len(sequence.input_ids) for sequence in self.sequences(row))

    def other_columns(self, row: dict) -> dict[str, Any]:
        """What a prepared row holds beside token ids and labels: `{"label": True, "tags": ["maths"]}`."""
        return {name: row[name] for name, kind in self.columns.items() if kind not in (IDS, LABELS, WEIGHTS)}

    def id_columns(self) -> list[str]:
        return [name for name, kind in self.columns.items() if kind == IDS]

    def example(self, ids: list[int]) -> dict:
        """A prepared row of given tokens, all labelled, for trying a model out.

        Args:
            ids: more than four; of several sequences the later ones are longer and differ at their ends.
        """
        row = {name: _ANY_VALUE[kind] for name, kind in self.columns.items() if kind in _ANY_VALUE}
        for number, (_, columns, labels) in enumerate(self.sequence_columns):
            start = _PROMPT_OF_EXAMPLE if len(columns) > 1 else 0
            # all of the prompt in the first of the columns before the last
            parts = [ids[:start], *[[] for _ in columns[1:-1]], [*ids[start:], *ids[: 2 * number]]][-len(columns) :]
            row |= dict(zip(columns, parts, strict=True)) | {labels: parts[-1]}
        return row

    def with_columns(self, columns: dict[str, str]) -> "RowType":
        """This type for rows with other names: `columns` is name in a format → name in the files (`--columns`)."""

        def fields_read(row: dict) -> list[str]:
            names = self.fields_read(rename_fields(row, columns))
            return [*names, *(columns[name] for name in names if name in columns)]

        return replace(self, read=with_columns(self.read, columns), fields_read=fields_read) if columns else self

    def unread(self, row: Any) -> list[str]:
        """The fields of a raw row that are neither read nor known to be descriptive."""
        return unread_fields(row, self.fields_read(row)) if isinstance(row, dict) else []
