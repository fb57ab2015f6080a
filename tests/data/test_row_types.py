"""What a row type says of its prepared rows, against literal rows."""

import dataclasses

import datasets
import numpy
import pytest

from utils.data.cache import rows_key
from utils.data.encode import RowEncoder, encode_chunk
from utils.data.files import RawRow
from utils.data.parallel import Chunk
from utils.data.row_type import BOOL, FLOAT, TEXT, TEXTS, Sequence
from utils.data.row_types import CONVERSATION, PAIR, PLAIN_TEXT
from utils.train.plan import measure

ROW = {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}
PAIR_ROW = {
    "prompt_ids": [1, 2], "chosen_ids": [3, 4], "chosen_labels": [-100, 4], "rejected_ids": [5], "rejected_labels": [5],
}  # fmt: skip
RATED = dataclasses.replace(
    CONVERSATION, columns={**CONVERSATION.columns, "good": BOOL, "score": FLOAT, "by": TEXT, "tags": TEXTS}
)
RATED_ROW = {**ROW, "good": False, "score": 0.5, "by": "Anna", "tags": ["a", "b"]}


@pytest.mark.parametrize(
    ("row_type", "row", "sequences"),
    [
        (CONVERSATION, ROW, [Sequence("", [1, 2, 3], [-100, 2, 3], 0)]),
        (PLAIN_TEXT, ROW, [Sequence("", [1, 2, 3], [-100, 2, 3], 0)]),
        (
            PAIR,
            PAIR_ROW,
            [
                Sequence("chosen", [1, 2, 3, 4], [-100, -100, -100, 4], 2),
                Sequence("rejected", [1, 2, 5], [-100, -100, 5], 2),
            ],
        ),
        (RATED, RATED_ROW, [Sequence("", [1, 2, 3], [-100, 2, 3], 0)]),
    ],
)
def test_the_sequences_of_a_row(row_type, row, sequences):
    assert row_type.sequences(row) == sequences
    assert row_type.length(row) == max(len(sequence.input_ids) for sequence in sequences)


def test_an_example_has_every_column_and_pairs_that_differ():
    ids = list(range(10, 19))
    assert CONVERSATION.example(ids) == {"input_ids": ids, "labels": ids}
    assert RATED.example(ids) == {"input_ids": ids, "labels": ids, "good": True, "score": 1.0, "by": "", "tags": []}
    pair = PAIR.example(ids)
    assert pair.keys() == PAIR.columns.keys() and pair["prompt_ids"] == ids[:4]
    assert pair["chosen_ids"] == pair["chosen_labels"] == ids[4:]
    assert pair["rejected_ids"] == pair["rejected_labels"] == [*ids[4:], 10, 11]


def test_a_filler_has_no_source_and_trains_nothing_or_repeats_the_first_row():
    assert CONVERSATION.filler({**ROW, "source": [7]}) == {"input_ids": [0], "labels": [-100], "source": []}
    assert PAIR.filler({**PAIR_ROW, "source": [7]}) == {**PAIR_ROW, "source": []}


def test_what_is_beside_the_tokens():
    assert RATED.other_columns(RATED_ROW) == {"good": False, "score": 0.5, "by": "Anna", "tags": ["a", "b"]}
    assert CONVERSATION.other_columns(ROW) == PAIR.other_columns(PAIR_ROW) == {}


def test_a_bool_a_number_and_texts_are_encoded_counted_and_part_of_the_rows_key():
    encoder = RowEncoder(
        (".jsonl",), dict, lambda rows: [{**row, "shortened": False} for row in rows], {}, RATED.columns
    )
    raw = [RawRow("rows.jsonl", 1, RATED_ROW), RawRow("rows.jsonl", 2, {**RATED_ROW, "tags": []})]
    part = encode_chunk(encoder, "auto", Chunk(0, "rows.jsonl", raw))
    assert (part.tokens, part.trained_tokens) == (6, 4)
    rows = part.batch.to_pylist()
    assert {name: rows[0][name] for name in RATED.columns} == {**RATED_ROW, "loss_weights": None}
    assert rows[1]["tags"] == []

    def key(**changes):
        return rows_key(datasets.Dataset.from_list([{**RATED_ROW, **changes}]))

    changes = ({}, {"good": True}, {"score": 0.25}, {"by": "Bob"}, {"tags": ["a"]}, {"tags": ["ab"]})
    assert len({key(**change) for change in changes}) == len(changes) and key() == key()


@pytest.mark.parametrize(
    ("row_type", "row", "counts"),
    [(CONVERSATION, ROW, (3, 2, 3, 1)), (PAIR, PAIR_ROW, (7, 2, 4, 2)), (RATED, RATED_ROW, (3, 2, 3, 1))],
)  # fmt: skip
def test_tokens_counted_over_all_sequences(row_type, row, counts):
    found = measure(datasets.Dataset.from_list([row, row]), row_type)
    assert (found.tokens == counts[0]).all() and (found.trained == counts[1]).all()
    assert (found.longest == counts[2]).all() and found.sequences == counts[3] and numpy.all(found.examples == 1)


def test_fields_that_are_not_read():
    assert CONVERSATION.unread({"messages": [], "score": 3, "id": 1}) == ["score"]
    assert PAIR.unread({"chosen": "a", "margin": 2}) == ["margin"] and PLAIN_TEXT.unread("no object") == []
