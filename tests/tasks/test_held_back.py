"""Rows held back by `--val_size`: whole rows of the files, never a part of one that is trained on."""

import pytest
from conftest import write_rows

from utils.args import parse_args
from utils.doctor.examine import quick_findings
from utils.tasks import get_task
from utils.template import get_template

TEXTS = [{"text": f"Text {i}. " + " ".join(f"{i} and {k} make {i + k}." for k in range(4 + i))} for i in range(13)]
CHATS = [{"instruction": f"What is {i} plus {i}?", "output": f"It is {2 * i}."} for i in range(20)]
PAIRS = [{"prompt": f"What is {i} plus {i}?", "chosen": f"It is {2 * i}.", "rejected": "No."} for i in range(20)]
TASKS = {"pretrain": TEXTS, "sft": CHATS, "dpo": PAIRS}


@pytest.fixture
def load(tiny_models, tmp_path, tokenizer):
    def run(task, *flags, rows=None):
        path = write_rows(tmp_path / "rows.jsonl", rows or TASKS[task])
        fixed = ["--train_data_path", path, "--output_dir", str(tmp_path / "run"), "--cache_dir", str(tmp_path / "c")]
        argv = ["--train_args_path", f"train_args/{task}/base.py", "--model_name_or_path", tiny_models(), *fixed]
        args, train_args = parse_args([*argv, "--max_len", "64", *flags])
        kind = get_task(args.task_type)
        template = get_template(args.template_name, tokenizer) if kind.uses_template else None
        data = kind.load_datasets(args, train_args, template, tokenizer)
        run.findings = quick_findings(args, train_args, data, template, tokenizer, 1, memory=False, rows=100_000)
        return data

    return run


def lines(part):
    return sorted({source for row in part["source"] for source in row})


def found(load):
    return [finding for finding in load.findings if finding.code == "EVAL_IN_TRAIN"]


@pytest.mark.parametrize("task", ["pretrain", "sft"])
@pytest.mark.parametrize("size", ["0.3", "4"])
def test_rows_are_held_back_before_they_are_packed(load, tokenizer, task, size):
    packed = load(task, "--packing", "true", "--val_size", size)
    assert not found(load)
    assert "seq_lengths" in packed.train.column_names and packed.train.column_names == packed.eval.column_names
    rows = len(TASKS[task])
    trained, held = lines(packed.train), lines(packed.eval)
    assert not set(trained) & set(held) and sorted(trained + held) == list(range(1, rows + 1))
    count = round(0.3 * rows) if size == "0.3" else 4
    assert (len(held), packed.held_back, packed.rows_trained()) == (count, count, rows - count)
    # the same rows as without packing, and every token of theirs
    plain = load(task, "--packing", "false", "--val_size", size, "--max_len", "512")
    assert (lines(plain.train), lines(plain.eval)) == (trained, held)
    for part, whole in ((packed.train, plain.train), (packed.eval, plain.eval)):
        ids = [sorted(token for row in rows["input_ids"] for token in row) for rows in (part, whole)]
        assert ids[0] == ids[1]


def test_packed_rows_are_held_back_by_the_seed_and_found_again(load, tmp_path):
    flags = ["--packing", "true", "--val_size", "4"]
    first = load("pretrain", *flags)
    kept = sorted((tmp_path / "c").iterdir())
    again = load("pretrain", *flags)
    assert sorted((tmp_path / "c").iterdir()) == kept
    assert (first.train[:], first.eval[:], first.report.key) == (again.train[:], again.eval[:], again.report.key)
    others = [load("pretrain", *flags, "--seed", str(seed)) for seed in range(3)]
    assert len({str(lines(data.eval)) for data in others}) > 1
    assert len({data.report.key for data in others}) > 1


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("packing", ["true", "false"])
def test_validation_rows_that_repeat_a_trained_one_are_found_at_the_start(load, task, packing):
    if task == "dpo" and packing == "true":
        return  # pairs are not packed
    flags = [] if task == "dpo" else ["--packing", packing]
    once = load(task, *flags, "--val_size", "4", "--max_len", "512")
    assert not found(load)
    held = [row for row in TASKS[task] if TASKS[task].index(row) + 1 in lines(once.eval)]
    twice = load(task, *flags, "--val_size", "0.5", "--max_len", "512", rows=TASKS[task] * 2)
    trained = {(line - 1) % len(TASKS[task]) for line in lines(twice.train)}
    repeated = [line for line in lines(twice.eval) if (line - 1) % len(TASKS[task]) in trained]
    (finding,) = found(load)
    assert finding.message.startswith(f"{len(repeated)} of {twice.held_back} rows for validation have the ids")
    assert len(held) == 4 and (packing == "true") == (not finding.places)
    if finding.places:
        assert [places.lines for places in finding.places.values()] == [repeated]


def test_a_file_that_is_given_for_both_is_named(load, tmp_path):
    other = write_rows(tmp_path / "other.jsonl", [*CHATS[:2], {"instruction": "New?", "output": "Yes."}])
    load("sft", "--eval_data_path", other)
    (finding,) = found(load)
    assert finding.message == "2 of 3 rows for validation have the ids of a training row"
    assert {file: places.lines for file, places in finding.places.items()} == {other: [1, 2]}
    load("sft", "--eval_data_path", str(tmp_path / "rows.jsonl"))
    (finding,) = found(load)
    assert f"'{tmp_path / 'rows.jsonl'}' is given for both" in finding.message


def test_a_packed_run_resumes_with_the_rows_it_held_back(train, tmp_path):
    """The held rows are in the key of the checkpoint: another seed is refused, the same goes on."""
    from utils.runtime.errors import UserError

    data = write_rows(tmp_path / "texts.jsonl", TEXTS)
    flags = ["--train_args_path", "train_args/pretrain/base.py", "--val_size", "3", "--max_len", "64"]
    steps = ["--save_strategy", "steps", "--save_steps", "1", "--max_steps", "2"]
    folder = train(*flags, *steps, data=data)
    assert (folder / "checkpoint-2").is_dir()
    more = [*flags, "--save_strategy", "steps", "--save_steps", "1", "--max_steps", "3"]
    with pytest.raises(UserError, match="seed that held rows back"):
        train(*more, "--resume_from_checkpoint", "true", "--seed", "7", data=data)
    train(*more, "--resume_from_checkpoint", "true", data=data)
    assert (folder / "trainer_state.json").is_file()
