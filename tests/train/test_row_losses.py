"""The losses of rows in a real training: by source in the log, and in the row ledger."""

import json
import shutil

import pyarrow.parquet
import pytest
import tiny
import torch
from conftest import write_rows
from test_accumulation import STEPS, on_two
from transformers import AutoModelForCausalLM, AutoTokenizer

from utils.data.conversations import to_messages
from utils.data.places import encode_source
from utils.storage.run_files import LEDGER_FILE
from utils.template import get_template
from utils.train.row_losses import PendingLosses, source_figures, sum_by_source

FULL = ["--train_mode", "full", "--precision", "fp32", "--warmup_steps", "0", "--lr_scheduler_type", "constant"]
STILL = [*FULL, "--learning_rate", "0"]
MOVING = [*FULL, "--learning_rate", "0.003"]
EVERY = ["--logging_steps", "1", "--row_ledger", "true"]
FORMS = {
    "padded": ["--padding_free", "false"],
    "padding-free": [],
    "packed": ["--packing", "true", "--max_len", "128"],
    "accumulated": ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "3"],
}
EVALUATION = ["--eval_strategy", "steps", "--eval_steps", "1", "--per_device_eval_batch_size", "3"]


@pytest.fixture
def two_files(tmp_path):
    """The rows in two files: the first three, and the others."""
    return [write_rows(tmp_path / "first.jsonl", tiny.ROWS[:3]), write_rows(tmp_path / "rest.jsonl", tiny.ROWS[3:])]


def history(folder):
    return json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]


def training(folder):
    return [entry for entry in history(folder) if "loss" in entry]


def ledger(folder):
    return pyarrow.parquet.read_table(folder / LEDGER_FILE).to_pylist()


def losses_one_by_one(model_path, rows):
    """Sum of the losses and number of labelled tokens of each row, with a softmax over the whole vocabulary."""
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    tokenizer, template, found = AutoTokenizer.from_pretrained(model_path), get_template("qwen"), []
    for row in rows:
        encoded = template.encode(to_messages(row), tokenizer)
        with torch.no_grad():
            odds = model(torch.tensor([encoded["input_ids"]])).logits[0].double().log_softmax(dim=-1)
        places = [place for place, label in enumerate(encoded["labels"]) if place and label != -100]
        found.append((-sum(float(odds[place - 1, encoded["labels"][place]]) for place in places), len(places)))
    return found


# ------------------------------------------------------------------ of one process
@pytest.mark.parametrize("form", FORMS)
def test_each_row_has_its_own_loss(form, train, tiny_models, two_files):
    folder = train(*STILL, *EVERY, *FORMS[form], data=",".join(two_files))
    wanted = losses_one_by_one(tiny_models(), tiny.ROWS)
    rows = ledger(folder)
    places = [(file, line) for file, lines in zip(two_files, (3, 5), strict=True) for line in range(1, lines + 1)]
    assert [(row["file"], row["line"]) for row in rows] == places
    for row, (loss, tokens) in zip(rows, wanted, strict=True):
        assert row["times"] == 2 and row["first_step"] < row["last_step"]
        for name in ("first", "last", "best", "worst", "mean"):
            assert row[f"{name}_loss"] == pytest.approx(loss / tokens, rel=1e-5), name


@pytest.mark.parametrize("form", FORMS)
def test_the_parts_add_up_to_the_whole(form, train, tiny_models, two_files):
    paths = ",".join(two_files)
    folder = train(*MOVING, *EVERY, *EVALUATION, *FORMS[form], "--eval_data_path", paths, data=paths)
    for prefix, entries in (("", training(folder)), ("eval_", [e for e in history(folder) if "eval_loss" in e])):
        assert len(entries) > 1 and len({entry[f"{prefix}loss"] for entry in entries}) == len(entries)
        for entry in entries:
            names = [name for name in ("first", "rest") if f"{prefix}loss/{name}" in entry]
            tokens = [entry[f"{prefix}tokens/{name}"] for name in names]
            losses = [entry[f"{prefix}loss/{name}"] for name in names]
            whole = sum(count * loss for count, loss in zip(tokens, losses, strict=True)) / sum(tokens)
            assert whole == pytest.approx(entry[f"{prefix}loss"], rel=1e-5)
    wanted = losses_one_by_one(tiny_models(), tiny.ROWS)
    per_epoch = sum(count for _, count in wanted)
    logged = sum(entry.get(f"tokens/{name}", 0) for entry in training(folder) for name in ("first", "rest"))
    assert logged == 2 * per_epoch
    final = losses_one_by_one(folder, tiny.ROWS)
    last = [entry for entry in history(folder) if "eval_loss" in entry][-1]
    for name, part in (("first", final[:3]), ("rest", final[3:])):
        loss, tokens = map(sum, zip(*part, strict=True))
        assert (last[f"eval_loss/{name}"], last[f"eval_tokens/{name}"]) == (
            pytest.approx(loss / tokens, rel=1e-5),
            tokens,
        )


def test_a_line_of_the_log_weights_the_steps_since_the_last_by_tokens(train, two_files):
    flags = [*MOVING, "--per_device_train_batch_size", "2", "--seed", "3"]
    each = training(train(*flags, *EVERY, data=",".join(two_files), output="each"))
    first, line = training(train(*flags, "--logging_steps", "8", data=",".join(two_files), output="line"))
    assert len(each) == 8 and (first["step"], line["step"]) == (1, 8)
    for name in ("first", "rest"):
        steps = [(entry[f"tokens/{name}"], entry[f"loss/{name}"]) for entry in each[1:] if f"loss/{name}" in entry]
        tokens = sum(count for count, _ in steps)
        assert line[f"tokens/{name}"] == tokens
        assert line[f"loss/{name}"] == pytest.approx(sum(n * loss for n, loss in steps) / tokens, rel=1e-5)


def test_the_steps_of_a_row_are_those_that_trained_it(train, two_files):
    """One row a step: its first and last losses are those of the log."""
    folder = train(*MOVING, *EVERY, "--per_device_train_batch_size", "1", data=",".join(two_files))
    losses = {entry["step"]: entry["loss"] for entry in training(folder)}
    assert len(losses) == 16
    for row in ledger(folder):
        assert row["first_loss"] == pytest.approx(losses[row["first_step"]], rel=1e-5)
        assert row["last_loss"] == pytest.approx(losses[row["last_step"]], rel=1e-5)


def test_streamed_rows_have_their_sources_too(train, two_files):
    flags = ["--streaming", "true", "--logging_steps", "1", "--max_steps", "4", "--per_device_train_batch_size", "3"]
    entries = training(train(*MOVING, *flags, data=",".join(two_files)))
    assert {name for entry in entries for name in entry if "loss/" in name} == {"loss/first", "loss/rest"}
    for entry in entries:
        parts = [
            (entry[f"tokens/{name}"], entry[f"loss/{name}"]) for name in ("first", "rest") if f"loss/{name}" in entry
        ]
        whole = sum(tokens * loss for tokens, loss in parts) / sum(tokens for tokens, _ in parts)
        assert whole == pytest.approx(entry["loss"], rel=1e-5)


def test_one_source_has_no_losses_of_its_own(train):
    assert not [name for entry in history(train(*MOVING, *EVERY)) for name in entry if "/" in name]


def test_rows_held_back_have_their_sources_too(train, two_files):
    folder = train(*MOVING, *EVALUATION, "--val_size", "4", "--seed", "1", data=",".join(two_files))
    entry = [entry for entry in history(folder) if "eval_loss" in entry][-1]
    parts = [(entry[f"eval_tokens/{name}"], entry[f"eval_loss/{name}"]) for name in ("first", "rest")]
    whole = sum(tokens * loss for tokens, loss in parts) / sum(tokens for tokens, _ in parts)
    assert whole == pytest.approx(entry["eval_loss"], rel=1e-5)


def test_texts_cut_by_packing_count_each_token_once(train, tiny_models, tmp_path):
    texts = [[{"text": row["output"]} for row in tiny.ROWS[part]] for part in (slice(0, 3), slice(3, 8))]
    data = ",".join(write_rows(tmp_path / f"{name}.jsonl", rows) for name, rows in zip("ab", texts, strict=True))
    flags = ["--train_args_path", "train_args/pretrain/base.py", "--packing", "true", "--max_len", "16"]
    folder = train(*MOVING, *EVERY, *flags, data=data)
    for entry in training(folder):
        parts = [(entry[f"tokens/{name}"], entry[f"loss/{name}"]) for name in "ab" if f"loss/{name}" in entry]
        whole = sum(tokens * loss for tokens, loss in parts) / sum(tokens for tokens, _ in parts)
        assert whole == pytest.approx(entry["loss"], rel=1e-5)
    rows = ledger(folder)
    assert len(rows) == 8 and max(row["times"] for row in rows) > 2, "no text was cut: the test tests nothing"


@pytest.mark.parametrize("flags", [["--loss_type", "dft"]])
def test_the_parts_are_of_the_loss_that_is_trained(flags, train, two_files):
    folder = train(*MOVING, *EVERY, *flags, data=",".join(two_files))
    for entry in training(folder):
        parts = [(entry[f"tokens/{name}"], entry[f"loss/{name}"]) for name in ("first", "rest")]
        whole = sum(tokens * loss for tokens, loss in parts) / sum(tokens for tokens, _ in parts)
        assert whole == pytest.approx(entry["loss"], rel=1e-5)
    first = {row["line"]: row["first_loss"] for row in ledger(folder) if row["first_step"] == 1}
    assert max(first.values()) > 2 * training(folder)[0]["loss"], "the ledger has the plain loss"


def test_pairs_have_their_own_losses(train, tmp_path):
    data = [
        write_rows(tmp_path / f"{name}.jsonl", rows) for name, rows in (("a", tiny.PAIRS[:3]), ("b", tiny.PAIRS[3:]))
    ]
    flags = ["--train_args_path", "train_args/dpo/base.py", "--task_type", "dpo_single", *EVALUATION]
    folder = train(*MOVING, *EVERY, *flags, "--eval_data_path", ",".join(data), data=",".join(data))
    for prefix, entries in (("", training(folder)), ("eval_", [e for e in history(folder) if "eval_loss" in e])):
        assert len(entries) > 1
        for entry in entries:
            names = [name for name in "ab" if f"{prefix}loss/{name}" in entry]
            parts = [(entry[f"{prefix}pairs/{name}"], entry[f"{prefix}loss/{name}"]) for name in names]
            whole = sum(pairs * loss for pairs, loss in parts) / sum(pairs for pairs, _ in parts)
            assert whole == pytest.approx(entry[f"{prefix}loss"], rel=1e-4)
    rows = ledger(folder)
    assert [row["times"] for row in rows] == [2] * len(tiny.PAIRS)
    first = [row["first_loss"] for row in rows if row["first_step"] == 1]
    assert first == pytest.approx([0.6931] * len(first), abs=1e-3)  # log 2: policy and reference are one


# ------------------------------------------------------------------ resuming
def test_a_resumed_run_continues_the_ledger_exactly(train, two_files, tmp_path):
    flags = [*MOVING, "--row_ledger", "true", "--logging_steps", "3", "--save_strategy", "steps", "--save_steps", "4"]
    flags += ["--per_device_train_batch_size", "2", "--num_train_epochs", "3", "--save_total_limit", "9"]
    whole = train(*flags, data=",".join(two_files), output="whole")
    shutil.copytree(whole / "checkpoint-4", tmp_path / "cut" / "checkpoint-4")
    assert max(row["last_step"] for row in ledger(whole / "checkpoint-4")) == 4
    resumed = train(*flags, "--resume_from_checkpoint", "true", data=",".join(two_files), output="cut")
    assert ledger(resumed) == ledger(whole) and max(row["last_step"] for row in ledger(whole)) == 12
    later = [entry for entry in training(whole) if entry["step"] > 6]  # whose lines begin after the checkpoint
    assert later == [entry for entry in training(resumed) if entry["step"] > 6]


def test_a_ledger_that_begins_at_a_checkpoint_says_so(train, two_files, capfd):
    flags = [*MOVING, "--save_strategy", "steps", "--save_steps", "2", "--per_device_train_batch_size", "4"]
    data = ",".join(two_files)
    train(*flags, "--max_steps", "2", data=data)
    folder = train(*flags, "--max_steps", "4", "--resume_from_checkpoint", "true", "--row_ledger", "true", data=data)
    assert "the row ledger begins after step 2" in capfd.readouterr().err
    assert {row["first_step"] for row in ledger(folder)} == {3, 4}


@pytest.mark.parametrize("kind", ["joined", "split", "renamed"])
def test_a_resumed_run_with_the_rows_in_other_files_begins_a_ledger(train, two_files, tmp_path, capfd, kind):
    flags = [
        *MOVING,
        "--row_ledger",
        "true",
        "--save_strategy",
        "steps",
        "--save_steps",
        "2",
        "--train_sampling_strategy",
    ]
    flags += ["sequential", "--per_device_train_batch_size", "2"]
    joined, rest = write_rows(tmp_path / "all.jsonl", tiny.ROWS), shutil.copy(two_files[1], tmp_path / "other.jsonl")
    before, after = (
        ",".join(two_files),
        {"joined": joined, "split": ",".join(two_files), "renamed": f"{two_files[0]},{rest}"},
    )
    train(*flags, "--max_steps", "2", data=joined if kind == "split" else before)
    folder = train(*flags, "--max_steps", "4", "--resume_from_checkpoint", "true", data=after[kind])
    message, rows = "joined or split since", ledger(folder)
    assert (message in capfd.readouterr().err) == (kind != "renamed")
    assert min(row["first_step"] for row in rows) == (1 if kind == "renamed" else 3)
    assert {row["file"] for row in rows} <= set(after[kind].split(","))


def test_a_run_in_place_of_another_removes_its_ledger(train, rows_file):
    folder = train(*STILL, "--row_ledger", "true")
    assert (folder / LEDGER_FILE).is_file()
    train(*STILL, "--overwrite_output_dir", "true")
    assert not (folder / LEDGER_FILE).exists()


def test_a_task_without_losses_of_rows_refuses_the_ledger(refused, tiny_models, tmp_path):
    import main_train

    data = write_rows(tmp_path / "pairs.jsonl", tiny.PAIRS)
    flags = ["--model_name_or_path", tiny_models(), "--train_data_path", data, "--output_dir", str(tmp_path / "run")]
    flags += ["--train_args_path", "train_args/dpo/base.py", "--row_ledger", "true"]
    said = refused(main_train.main, *flags, "--task_type", "dpo_multi")
    assert "--row_ledger true is not supported with --task_type dpo_multi" in said and "dpo_single" in said


# ------------------------------------------------------------------ several processes
@pytest.mark.slow
@pytest.mark.usefixtures("fast_processes")
@pytest.mark.parametrize("form", ["padded", "packed"])
def test_two_processes_have_the_losses_of_one(form, train, tiny_models, tmp_path, two_files):
    """Eight rows, or packed fewer, in steps of three on one process and of 1 + 1 or 2 + 1 on two."""
    data = ",".join(two_files)
    flags = [*STEPS, *EVERY, *EVALUATION, *FORMS[form], "--eval_data_path", data, "--num_train_epochs", "2"]
    flags += ["--gradient_accumulation_steps", "3"]
    one = train(*flags, "--per_device_train_batch_size", "2", data=data, output="one")
    two, _ = on_two(tmp_path, tiny_models(), data, "two", *flags, "--per_device_train_batch_size", "1")
    for found, wanted in zip(history(two), history(one), strict=True):
        names = [name for name in wanted if "/" in name]
        assert {name: found.get(name) for name in names} == pytest.approx({n: wanted[n] for n in names}, rel=1e-3)
        assert names or "train_runtime" in wanted
    for found, wanted in zip(ledger(two), ledger(one), strict=True):
        assert found["file"] == wanted["file"]
        numbers = [name for name, value in wanted.items() if isinstance(value, int | float)]
        assert [found[name] for name in numbers] == pytest.approx([wanted[name] for name in numbers], rel=1e-3)


# ------------------------------------------------------------------ parts
def test_losses_that_are_not_finite_are_left_out_of_the_sums():
    import numpy as np

    sources = np.array([encode_source(0, 1), encode_source(1, 1), encode_source(2, 9), encode_source(1, 2)])
    figures = np.array([[6.0, 8.0, 1.0, float("nan")], [0, 0, 0, 0], [3.0, 2.0, 1.0, 5.0]], "float32")
    sums = sum_by_source(sources, figures, ("x", "y", "x"))
    assert source_figures(sums, "eval_", "tokens") == {
        "eval_loss/x": 7 / 4, "eval_tokens/x": 4, "eval_loss/y": 4.0, "eval_tokens/y": 2,
    }  # fmt: skip
    assert source_figures({"x": np.array([0.0, 0.0])}, "", "tokens") == {}


def test_pending_losses_keep_the_order_of_their_batches():
    pending = PendingLosses()
    assert pending.take() == (None, None, None)
    pending.add([5, 6], 1, torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    pending.add([7], 2, torch.tensor([[5.0], [6.0]]))
    sources, steps, figures = pending.take()
    assert (sources.tolist(), steps.tolist(), figures.tolist()) == ([5, 6, 7], [1, 1, 2], [[1, 2, 5], [3, 4, 6]])
    assert pending.take() == (None, None, None)
