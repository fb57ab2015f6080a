"""Training on streamed rows: as on prepared ones in the same order, resumed anywhere, and what happens to bad rows."""

import json
from types import SimpleNamespace

import pytest
import tiny
import torch
from conftest import write_rows
from safetensors.torch import load_file

import main_train
from benchmarks.matrix import two_processes
from utils.data import stream, stream_index
from utils.data.stream import RowOrder
from utils.storage.run_folder import RECORD_IN_PROGRESS
from utils.train.stream import StreamBatches, StreamMixin

TURNS = [row for row in tiny.ROWS * 9 if isinstance(row.get("output"), str)][:22]
ROWS = [{"instruction": f"{row['instruction']} {i}", "output": f"{row['output']} {i}"} for i, row in enumerate(TURNS)]
STREAM = ["--streaming", "true", "--shuffle_buffer", "8", "--precision", "fp32", "--logging_steps", "1",
          "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2"]  # fmt: skip
SAVES = ["--save_strategy", "steps", "--save_steps", "1", "--save_total_limit", "99", "--lora_dropout", "0.1"]
IN_ORDER = ["--train_sampling_strategy", "sequential"]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(stream_index, "CHUNK_ROWS", 3)


@pytest.fixture
def rows_file(tmp_path):
    return write_rows(tmp_path / "rows.jsonl", ROWS)


def losses(folder, after=0):
    history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry and entry["step"] > after}


def summary(folder):
    return json.loads((folder / "train_args.json").read_text(encoding="utf-8"))["summary"]


def same_weights(one, two):
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (one, two))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 22])
@pytest.mark.parametrize("drop_last", [False, True])
def test_a_step_has_the_same_rows_on_any_number_of_processes(rows, drop_last):
    steps, sizes = {}, [3] * (rows // 3) + [rows % 3] * (rows % 3 > 0)
    for processes, size in ((1, 4), (2, 2), (4, 1)):
        of_each = [
            list(StreamBatches(RowOrder(sizes, 5, 0), size, processes, process, drop_last))
            for process in range(processes)
        ]
        assert len({len(batches) for batches in of_each}) == 1
        steps[processes] = [sum(batches, []) for batches in zip(*of_each, strict=True)]
    assert steps[1] == steps[2] == steps[4]
    found = [row for step in steps[1] for row in step if row < rows]
    assert len(found) == len(set(found)) == (rows // 4 * 4 if drop_last else rows)


def test_batches_to_be_skipped_draw_no_rows(monkeypatch):
    order = RowOrder([3] * 9, 5, 0)
    batches = StreamBatches(order, 2, 1, 0)
    every = list(batches)
    batches.start_epoch(0, 5)
    drawn, rows = [], order.rows
    monkeypatch.setattr(order, "rows", lambda start, stop: drawn.append(start) or rows(start, stop))
    assert list(batches)[5:] == every[5:] and len(list(batches)) == len(every) and min(drawn) == 10


def test_as_prepared_rows_in_the_files_order(train):
    same = [*STREAM, *IN_ORDER, "--lora_dropout", "0.1"]
    streamed, prepared = train(*same, output="a"), train(*same, "--streaming", "false", output="b")
    assert losses(streamed) == losses(prepared) and len(losses(streamed)) == 12
    assert same_weights(streamed, prepared)
    ours, theirs = (json.loads((run / "train_args.json").read_text())["data"]["train"] for run in (streamed, prepared))
    assert ours.pop("files")[0].keys() == {"file", "bytes", "fingerprint"} and theirs.pop("files")
    assert ours == theirs


def test_weights_of_messages_are_those_of_prepared_rows(train, tmp_path):
    """Also where the first rows have none, and a batch has rows of both kinds."""
    turns = [[("user", f"Q {i}"), ("assistant", f"A {i}")] for i in range(12)]
    rows = [{"messages": [{"role": role, "content": text} for role, text in turn]} for turn in turns]
    for row in rows[7::2]:
        row["messages"][1]["weight"] = 0.5
    flags = [*STREAM, *IN_ORDER, "--num_train_epochs", "1"]
    data = f"{write_rows(tmp_path / 'a.jsonl', rows[:6])},{write_rows(tmp_path / 'b.jsonl', rows[6:])}"
    streamed = train(*flags, data=data, output="a")
    prepared = train(*flags, "--streaming", "false", data=data, output="b")
    assert losses(streamed) == losses(prepared) and same_weights(streamed, prepared)


def test_as_prepared_rows_written_in_the_order_of_the_seed(train, tmp_path):
    rows = RowOrder([3] * 7 + [1], 8, seed=7).rows(0, 22)
    ordered = write_rows(tmp_path / "ordered.jsonl", [ROWS[row] for row in rows])
    flags = [*STREAM, "--num_train_epochs", "1"]
    streamed = train(*flags, "--data_seed", "7", output="a")
    prepared = train(*flags, "--streaming", "false", *IN_ORDER, data=ordered, output="b")
    assert losses(streamed) == losses(prepared) and same_weights(streamed, prepared)


@pytest.mark.parametrize("workers", ["0", "2"])
def test_resumed_at_any_step_it_ends_bit_for_bit_and_reads_no_earlier_row(train, tmp_path, workers, monkeypatch):
    flags = [*STREAM, *SAVES, "--dataloader_num_workers", workers]
    undisturbed = train(*flags)
    assert len(losses(undisturbed)) == 12
    read, rows = [], stream.RowOrder.rows
    monkeypatch.setattr(stream.RowOrder, "rows", lambda self, *part: read.append(part[0]) or rows(self, *part))
    for step in (2, 8) if workers == "0" else (9,):
        read.clear()
        checkpoint = str(undisturbed / f"checkpoint-{step}")
        resumed = train(*flags, "--resume_from_checkpoint", checkpoint, output=f"from {step}")
        assert same_weights(resumed, undisturbed) and losses(resumed) == losses(undisturbed)
        assert read[0] == step % 6 * 4
        assert summary(resumed)["rows_trained"] == 22


def test_a_resume_refuses_other_files_and_another_order(train, refused, tmp_path, tiny_models, rows_file, monkeypatch):
    monkeypatch.setattr(stream, "SAMPLE_ROWS", 4)
    folder = train(*STREAM, *SAVES, "--max_steps", "2")
    flags = [*STREAM, *SAVES, "--resume_from_checkpoint", "true", "--max_steps", "3", "--output_dir", str(folder)]
    flags += ["--report_to", "none", "--model_name_or_path", tiny_models(), "--train_data_path"]
    for changed in (["--shuffle_buffer", "9"], ["--streaming", "false"], ["--seed", "7"]):
        assert changed[0][2:] in refused(main_train.main, *flags, rows_file, *changed)
    other = write_rows(tmp_path / "other.jsonl", [*ROWS[:-2], ROWS[-1], ROWS[-2]])  # the first rows are the same
    assert "the training rows" in refused(main_train.main, *flags, other)


def dropped_rows(tmp_path):
    """22 rows, of which 3, 4 and 9 to 12 are dropped: rows 9 to 12 are all of the third step, in the files' order."""
    rows = [*ROWS]
    for place in (2, 3, 8, 9, 10, 11):
        rows[place] = {"instruction": "empty", "output": ""}
    return write_rows(tmp_path / "dropped.jsonl", rows)


@pytest.mark.parametrize("workers", ["0", "1"])
def test_dropped_rows_leave_their_places_empty_and_are_counted(train, tmp_path, workers, monkeypatch):
    monkeypatch.setattr(stream, "SAMPLE_ROWS", 2)
    data = dropped_rows(tmp_path)
    flags = [*STREAM, *IN_ORDER, *SAVES, "--dataloader_num_workers", workers, "--num_train_epochs", "2"]
    folder = train(*flags, data=data)
    found = summary(folder)
    assert (found["rows_trained"], found["rows_dropped"], found["steps"]) == (16, 6, 12)
    record = json.loads((folder / "train_args.json").read_text())["data"]["train"]
    assert (record["rows"], record["kept"], record["dropped"]) == (22, 16, {"with nothing to train": 6})
    # a step without rows trains nothing
    adapters = [load_file(folder / f"checkpoint-{step}" / "adapter_model.safetensors") for step in (2, 3, 4)]
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])
    assert not all(torch.equal(adapters[1][name], adapters[2][name]) for name in adapters[0])
    # the first step's loss is that of its rows alone
    two = train(*STREAM, *IN_ORDER, "--max_steps", "1", data=write_rows(tmp_path / "two.jsonl", ROWS[:2]), output="two")
    assert losses(folder)[1] == pytest.approx(losses(two)[1], abs=1e-6)
    resumed = train(*flags, "--resume_from_checkpoint", str(folder / "checkpoint-3"), data=data, output="resumed")
    assert same_weights(resumed, folder)
    assert (summary(resumed)["rows_trained"], summary(resumed)["rows_dropped"]) == (16, 6)


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_bad_row_stops_the_run_and_it_continues_without_it(
    train, tmp_path, refused, tiny_models, workers, monkeypatch
):
    monkeypatch.setattr(stream, "SAMPLE_ROWS", 2)
    data = tmp_path / "bad.jsonl"
    lines = [json.dumps(row) for row in ROWS]
    lines[2], lines[9] = json.dumps({"instruction": "empty", "output": ""}), '{"instruction": "x", "outp'
    data.write_text("\n".join(lines))
    flags = [*STREAM, *IN_ORDER, *SAVES, "--dataloader_num_workers", workers, "--num_train_epochs", "1"]
    paths = ["--model_name_or_path", tiny_models(), "--train_data_path", str(data)]
    run = ["--output_dir", str(tmp_path / "run"), "--report_to", "none", "--disable_tqdm", "true"]
    shown = refused(main_train.main, *flags, *paths, *run, "--card_samples", "0")
    assert "bad.jsonl:10" in shown and "--on_bad_row drop" in shown and "--resume_from_checkpoint true" in shown
    assert [path.name for path in sorted((tmp_path / "run").glob("checkpoint-*"))] == ["checkpoint-1", "checkpoint-2"]
    record = json.loads((tmp_path / "run" / RECORD_IN_PROGRESS).read_text())["data"]["train"]
    assert (record["rows"], record["kept"], record["trained"]) == (8, 7, 7) and sum(record["dropped"].values()) == 1
    folder = train(*flags, "--on_bad_row", "drop", "--resume_from_checkpoint", "true", data=str(data))
    assert summary(folder)["rows_dropped"] == 2 and summary(folder)["steps"] == 6
    assert same_weights(folder, train(*flags, "--on_bad_row", "drop", data=str(data), output="at once"))


@pytest.mark.parametrize(("source", "loss"), [([1], 3.0), ([], 0.0)])
def test_a_row_in_place_of_dropped_ones_trains_nothing_in_any_task(source, loss):
    """By default it is a copy of the first row, with its labels."""

    class Trainer:
        model = SimpleNamespace(training=True)

        def training_step(self, model, inputs, count):
            return self.compute_loss(model, inputs)

        def compute_loss(self, *_):
            return torch.tensor(3.0)

    streaming = type("Streaming", (StreamMixin, Trainer), {})()
    for inputs in ([{"labels": [1], "source": source}], {"labels": [1], "source": source}):
        assert streaming.training_step(None, inputs) == loss


PAIRS = [{"prompt": f"Q {i}", "chosen": f"good {i}", "rejected": f"bad {i * 7}"} for i in range(11)]


@pytest.mark.parametrize("task", ["dpo_single", "dpo_multi", "pretrain"])
def test_other_tasks_stream(train, tmp_path, task, monkeypatch):
    monkeypatch.setattr(stream, "SAMPLE_ROWS", 1)
    rows = [{"text": f"some text {i}"} for i in range(11)] if task == "pretrain" else PAIRS
    empty = {"text": ""} if task == "pretrain" else {**PAIRS[0], "rejected": PAIRS[0]["chosen"]}
    rows = [*rows[:2], empty, empty, *rows[2:]]
    recipe = "pretrain" if task == "pretrain" else "dpo"
    flags = ["--train_args_path", f"train_args/{recipe}/base.py", "--task_type", task, *STREAM, *IN_ORDER,
             "--num_train_epochs", "1", "--per_device_train_batch_size", "1", *SAVES[:6]]  # fmt: skip
    flags += ["--packing", "false"] if task == "pretrain" else []
    folder = train(*flags, data=write_rows(tmp_path / "data.jsonl", rows))
    found = summary(folder)
    assert (found["rows_trained"], found["rows_dropped"], found["steps"]) == (11, 2, 7)
    prepared = train(*flags, "--streaming", "false", data=str(tmp_path / "data.jsonl"), output="prepared")
    history = [json.loads((run / "trainer_state.json").read_text())["log_history"] for run in (folder, prepared)]
    tokens = [[entry["num_tokens"] for entry in entries if "num_tokens" in entry][-1:] for entries in history]
    assert tokens[0] == tokens[1]  # those of rows, not of empty places
    adapters = [load_file(folder / f"checkpoint-{step}" / "adapter_model.safetensors") for step in (1, 2, 3)]
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])
    assert not all(torch.equal(adapters[1][name], adapters[2][name]) for name in adapters[0])


@pytest.mark.slow
@pytest.mark.usefixtures("fast_processes")
@pytest.mark.parametrize("workers", ["0", "2"])
def test_two_processes_stream_as_one_and_resume_bit_for_bit(train, tmp_path, tiny_models, workers, monkeypatch):
    monkeypatch.setattr(stream_index, "CHUNK_ROWS", 256)  # as in the other processes
    data = dropped_rows(tmp_path)
    flags = [*STREAM[:-2], "--gradient_accumulation_steps", "1", *SAVES[:-2], "--num_train_epochs", "2"]
    flags += ["--dataloader_num_workers", workers, "--train_special_tokens", "off"]
    run = ["main_train.py", "--deepspeed", "zero0", "--model_name_or_path", tiny_models(), "--train_data_path", data,
           "--report_to", "none", "--disable_tqdm", "true", "--card_samples", "0", *flags]  # fmt: skip
    undisturbed, resumed = tmp_path / "undisturbed", tmp_path / "resumed"
    for folder, more in ((undisturbed, []), (resumed, ["--resume_from_checkpoint", str(undisturbed / "checkpoint-8")])):
        done = two_processes([*run, "--output_dir", str(folder), *more])
        assert done.returncode == 0, done.stderr[-3000:]
        assert (summary(folder)["rows_trained"], summary(folder)["rows_dropped"]) == (16, 6)
    assert same_weights(undisturbed, resumed) and losses(undisturbed) == losses(resumed)
    alone = train(*flags, "--gradient_accumulation_steps", "2", data=data, output="alone")
    assert losses(undisturbed) == pytest.approx(losses(alone), abs=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("fast_processes")
def test_a_bad_row_stops_both_processes(tmp_path, tiny_models):
    data = tmp_path / "bad.jsonl"
    lines = [json.dumps(ROWS[i % len(ROWS)]) for i in range(1100)]
    lines[1020] = "{"
    data.write_text("\n".join(lines))
    run = ["main_train.py", "--deepspeed", "zero0", "--model_name_or_path", tiny_models(), "--train_data_path", data,
           "--report_to", "none", "--disable_tqdm", "true", *STREAM, "--per_device_train_batch_size", "64",
           "--output_dir", str(tmp_path / "run")]  # fmt: skip
    done = two_processes(list(map(str, run)))
    shown = done.stdout + done.stderr
    assert done.returncode == 2 and shown.count("bad.jsonl:1021") == 1 and "Traceback" not in shown, shown[-3000:]
