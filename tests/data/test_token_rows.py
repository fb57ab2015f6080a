"""Rows that are token ids: read from every kind of file, checked, and trained as they are."""

import json
import struct

import datasets
import numpy
import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import write_rows
from transformers import AutoModelForCausalLM

from utils.args import parse_args
from utils.data.bad_rows import BadRow
from utils.data.token_rows import TokenRow, read_token_row
from utils.runtime.errors import UserError
from utils.template import get_template

IDS = [[5, 6, 7, 8], [9, 10, 11], [12, 13, 14, 15, 16]]
ROWS = [{"input_ids": ids, "labels": [-100, *ids[1:]]} for ids in IDS]


@pytest.fixture
def load(tiny_models, tmp_path, tokenizer):
    """Prepares a file as main_train.py does; returns the task's Data."""

    def run(path, *flags, task="sft"):
        args, train_args = parse_args(
            ["--train_args_path", f"train_args/{task}/base.py", "--model_name_or_path", tiny_models(),
             "--train_data_path", str(path), "--output_dir", str(tmp_path / "run"), "--cache_dir",
             str(tmp_path / "cache"), *flags]
        )  # fmt: skip
        template = get_template(args.template_name, tokenizer)
        return args.task.load_datasets(args, train_args, template, tokenizer)

    return run


@pytest.mark.parametrize(("row", "read"), [
    ({"input_ids": [5, 6], "labels": [-100, 6]}, ([5, 6], [-100, 6])),
    ({"input_ids": [5, 6]}, ([5, 6], None)),
    ({"input_ids": [0, 5, 6, 0], "labels": [-100, -100, 6, -100], "attention_mask": [0, 1, 1, 0]}, ([5, 6], [-100, 6])),
    ({"input_ids": [5, 6, 7], "completion_mask": [0, 1, 1]}, ([5, 6, 7], [-100, 6, 7])),
    ({"input_ids": [5, 6, 7], "assistant_masks": [0, 0, 1], "attention_mask": [1, 1, 1]}, ([5, 6, 7], [-100, -100, 7])),
    ({"input_ids": [5, 6], "labels": None, "id": 3}, ([5, 6], None)),
])  # fmt: skip
def test_a_row_of_ids(row, read):
    assert read_token_row(row) == TokenRow(*read)


@pytest.mark.parametrize(("row", "said"), [
    ({"input_ids": ["5"]}, "has in 'input_ids' something other than a list of whole numbers"),
    ({"input_ids": [5.0]}, "has in 'input_ids' something other"),
    ({"input_ids": [5, 6], "labels": [5]}, "has 1 values in 'labels' and 2 in 'input_ids'"),
    ({"input_ids": [5, 6, 7], "labels": [-100, 7, 7]}, "has label 7 where the token is 6"),
    ({"input_ids": [5, 6, 7], "labels": [6, 7, -100]}, "has label 6 where the token is 5.*not of the next one"),
    ({"input_ids": [5, 6], "labels": [5, 6], "completion_mask": [1, 1]}, "has 'labels' and 'completion_mask'"),
    ({"input_ids": [5, 6, 7], "attention_mask": [1, 0, 1]}, "has a 0 in its 'attention_mask' between tokens"),
    ({"input_ids": [5, 6], "attention_mask": [0, 0]}, "has an 'attention_mask' of zeros"),
    ({"input_ids": [5, 6], "attention_mask": [1, 2]}, "other values than 0 and 1"),
    ({"input_ids": [5, 6], "attention_mask": [1]}, "has 1 values in 'attention_mask'"),
    ({"input_ids": [5, 6], "position_ids": [0, 0]}, "has 'position_ids' beside 'input_ids', which is not read"),
])  # fmt: skip
def test_what_is_refused(row, said):
    with pytest.raises(BadRow, match=said):
        read_token_row(row)


def write_indexed(prefix, documents, kind="<u2", code=8):
    """The two files as Megatron-LM writes them; each document is a list of sequences of ids."""
    sequences = [numpy.array(ids, kind) for document in documents for ids in document]
    sizes = numpy.array([len(ids) for ids in sequences], "<i4")
    starts = numpy.cumsum([0, *(ids.nbytes for ids in sequences)])[:-1].astype("<i8")
    ends = numpy.cumsum([0, *(len(document) for document in documents)]).astype("<i8")
    prefix.with_suffix(".bin").write_bytes(b"".join(ids.tobytes() for ids in sequences))
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(sequences), len(ends))
    prefix.with_suffix(".idx").write_bytes(header + sizes.tobytes() + starts.tobytes() + ends.tobytes())
    return prefix.with_suffix(".bin")


@pytest.mark.parametrize("kind", ["jsonl", "gz", "parquet", "arrow", "save_to_disk"])
def test_every_kind_of_file(load, tmp_path, kind):
    import gzip

    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        write_rows(path, ROWS)
    elif kind == "gz":
        path = tmp_path / "rows.jsonl.gz"
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS).encode()))
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    elif kind == "arrow":
        with pyarrow.ipc.new_file(path, (table := pyarrow.Table.from_pylist(ROWS)).schema) as writer:
            writer.write_table(table)
    else:
        datasets.Dataset.from_list(ROWS).save_to_disk(str(path))
    data = load(path)
    assert [{name: row[name] for name in ROWS[0]} for row in data.train] == ROWS
    assert data.report.trained_tokens == 9 and data.report.unread == {}


@pytest.mark.parametrize(("kind", "code"), [("<u2", 8), ("<i4", 4), ("<i8", 5)])
def test_indexed_files_of_megatron(load, tmp_path, kind, code):
    file = write_indexed(tmp_path / "rows", [[IDS[0]], [IDS[1], IDS[2]]], kind, code)
    data = load(file, "--packing", "false", task="pretrain")
    assert [row["input_ids"] for row in data.train] == [IDS[0], IDS[1] + IDS[2]]
    assert data.train["labels"] == data.train["input_ids"] and data.train["source"] == [[1], [2]]
    packed = load(file, "--max_len", "3", task="pretrain")
    assert sorted(token for row in packed.train for token in row["input_ids"]) == sorted(sum(IDS, []))
    before = data.report.hashes[str(file)]
    write_indexed(tmp_path / "rows", [[IDS[0]], [IDS[1]], [IDS[2]]], kind, code)  # the same .bin
    again = load(file, "--packing", "false", task="pretrain")
    assert [row["input_ids"] for row in again.train] == IDS and again.report.hashes[str(file)] != before
    assert len(load(tmp_path / "rows.bin", "--packing", "false", task="pretrain").train) == 3
    with pytest.raises(UserError, match="not one of the kinds of file this task reads"):
        load(file)  # there are no labels


@pytest.mark.parametrize(("damage", "said"), [
    (lambda folder: (folder / "rows.idx").unlink(), "has no index rows.idx beside it"),
    (lambda folder: (folder / "rows.idx").write_bytes(b"GGUF"), "not one of Megatron-LM"),
    (lambda folder: (folder / "rows.idx").write_bytes((folder / "rows.idx").read_bytes()[:-4]), "bytes, not"),
    (lambda folder: (folder / "rows.bin").write_bytes(b"12"), "does not fit its index rows.idx"),
    (lambda folder: write_indexed(folder / "rows", [[IDS[0]]], "<f4", 7), "with ids of type 7"),
])  # fmt: skip
def test_damaged_indexed_files_are_named(load, tmp_path, damage, said):
    file = write_indexed(tmp_path / "rows", [[ids] for ids in IDS])
    damage(tmp_path)
    with pytest.raises(UserError, match=said):
        load(file, task="pretrain")


def test_ids_and_texts_in_one_file(load, tmp_path, tokenizer):
    text = {"instruction": "Hi", "output": "Hello"}
    data = load(write_rows(tmp_path / "rows.jsonl", [ROWS[0], text, ROWS[1]]))
    encoded = get_template("qwen", tokenizer).encode(
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}], tokenizer
    )
    assert data.train["input_ids"] == [IDS[0], encoded["input_ids"], IDS[1]] and data.report.answers == 1


def test_rows_that_cannot_be_trained_are_named(load, tmp_path, tokenizer):
    largest = max(tokenizer.get_vocab().values())
    for row, said in (
        ({"input_ids": [5, largest + 1], "labels": [-100, largest + 1]}, f"rows.jsonl:1 has the id {largest + 1}"),
        ({"input_ids": [5, -1]}, "has the id -1"),
        ({"input_ids": [5, 6]}, "rows.jsonl:1 has 'input_ids' without 'labels'"),
    ):
        with pytest.raises(UserError, match=said):
            load(write_rows(tmp_path / "rows.jsonl", [row, *ROWS]))
    data = load(write_rows(tmp_path / "rows.jsonl", [{"input_ids": [5, 6]}]), "--train_on", "prompt")
    assert data.train[0]["labels"] == [5, 6]
    rows = [*ROWS, {"input_ids": [5, 6], "labels": [5, -100]}]
    report = load(write_rows(tmp_path / "rows.jsonl", rows), "--max_len", "4").report
    assert report.kept == 2 and report.dropped == {"too long": 1, "with nothing to train": 1}
    with pytest.raises(UserError, match="1 of 4 rows are too long"):
        load(tmp_path / "rows.jsonl", "--max_len", "4", "--overlong", "error")
    with pytest.raises(UserError, match="rows.jsonl:1"):
        load(tmp_path / "rows.jsonl", task="dpo")


def test_fields_beside_ids_are_named_and_columns_renamed(load, tmp_path):
    rows = [{**row, "messages": [{"role": "user", "content": "Hi"}]} for row in ROWS]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    assert load(file).report.unread == {file: {"messages": 3}}
    file = write_rows(tmp_path / "named.jsonl", [{"tokens": row["input_ids"], "labels": row["labels"]} for row in ROWS])
    assert load(file, "--columns", '{"input_ids": "tokens"}').train["input_ids"] == IDS


@pytest.mark.parametrize("task", ["sft", "pretrain"])
def test_the_loss_is_that_of_plain_transformers(train, tiny_models, tmp_path, task):
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    folder = train("--train_args_path", f"train_args/{task}/base.py", "--precision", "fp32", "--max_steps", "1",
                   "--logging_steps", "1", data=data)  # fmt: skip
    log = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    model, losses = AutoModelForCausalLM.from_pretrained(tiny_models(), dtype=torch.float32), []
    for ids in IDS:
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none"))
    assert log[0]["loss"] == pytest.approx(float(torch.cat(losses).mean()), rel=1e-5)


def test_commands_take_them(tiny_models, tmp_path, capsys, monkeypatch):
    from utils.script import doctor, explain, show_data

    file = write_rows(tmp_path / "rows.jsonl", ROWS)
    flags = ["--model_name_or_path", tiny_models(), "--train_data_path", file, "--output_dir", str(tmp_path / "run")]
    show_data.main(flags)
    assert "rows.jsonl:3: 5 tokens, 4 trained" in capsys.readouterr().out
    doctor.main(flags)
    said = capsys.readouterr().out
    assert "0 errors" in said and "STOP_NOT_TRAINED" in said  # a warning: the ids are their user's
    assert "DUPLICATE" not in said and "UNREADABLE" not in said
    explain.main(flags)
    assert "3 of 3 train" in capsys.readouterr().out
