"""Training in the order of a mixture or a curriculum: the same rows on any number of processes, also after a resume."""

import json

import numpy
import pytest
import torch
from conftest import write_rows
from safetensors.torch import load_file

import main_train
from benchmarks.matrix import two_processes
from utils.data.mixture import Mixture
from utils.data.sources import Source
from utils.train.order import OrderMixin
from utils.train.plan import Rows, first_epoch, plan, rows_of_epochs

SIZES = (14, 9, 21)
FLAGS = ["--precision", "fp32", "--logging_steps", "1", "--lora_dropout", "0.1", "--num_train_epochs", "3",
         "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2",
         "--train_special_tokens", "off"]  # fmt: skip
SAVES = ["--save_strategy", "steps", "--save_steps", "1", "--save_total_limit", "99"]


@pytest.fixture
def files(tmp_path):
    def rows(n, size):
        return [{"instruction": f"Q{n} {i}", "output": f"A {i}" * n} for i in range(size)]

    return [write_rows(tmp_path / f"s{n}.jsonl", rows(n, size)) for n, size in enumerate(SIZES, 1)]


@pytest.fixture
def weighted(files):
    return ",".join(f"{file}:{weight}" for file, weight in zip(files, (3, 1, 2), strict=True))


@pytest.fixture
def batches(monkeypatch):
    """The sources of each batch of the trainings of this process."""
    seen = []

    class Noted(OrderMixin):
        def get_batch_samples(self, *args):
            found, count = super().get_batch_samples(*args)
            seen.append([source for batch in found for source in batch["source"]])
            return found, count

    monkeypatch.setattr("utils.train.order.OrderMixin", Noted)
    return seen


def losses(folder, after=0):
    history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry and entry["step"] > after}


def record(folder):
    return json.loads((folder / "train_args.json").read_text(encoding="utf-8"))


def same_weights(one, two):
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (one, two))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def order(strategy="weighted", weights=(3, 1, 2), **options):
    sources = tuple(Source(f"s{n}", f"s{n}", weight) for n, weight in enumerate(weights, 1))
    return Mixture(sources, SIZES, (1.0,) * 3, strategy, seed=42, **options)


def places(found, epoch):
    """(file, line) as encoded of the rows of an epoch: file n has SIZES[n] rows, from line 1."""
    every = [(n << 40) + line for n, size in enumerate(SIZES) for line in range(1, size + 1)]
    return [every[row] for row in found.indices(epoch)]


def test_each_epoch_trains_the_rows_of_the_mixture_in_its_order(train, weighted, batches):
    folder = train(*FLAGS, data=weighted)
    expected = order()
    assert len(expected) == 28 and sum(batches, []) == sum((places(expected, epoch) for epoch in range(3)), [])
    assert len(losses(folder)) == 21
    drawn = record(folder)["summary"]["mixture"]
    assert [line["rows"] for line in drawn] == [3 * count for count in expected.counts]
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert all(f"| `s{n}` | {line['rows']:,} (" in card for n, line in enumerate(drawn, 1))
    assert [name for name in json.loads((folder / "trainer_state.json").read_text())["log_history"][-2]
            if name.startswith("loss/")]  # fmt: skip


def test_a_run_that_ends_within_an_epoch_counts_what_was_drawn(train, weighted, batches):
    folder = train(*FLAGS, "--max_steps", "10", data=weighted)
    drawn = [line["rows"] for line in record(folder)["summary"]["mixture"]]
    assert drawn == [sum(source >> 40 == n for batch in batches for source in batch) for n in range(3)]


@pytest.mark.parametrize("step", [3, 9, 14])
def test_resumed_at_any_step_it_ends_bit_for_bit(train, weighted, batches, step):
    undisturbed = train(*FLAGS, *SAVES, data=weighted)
    every = list(batches)
    batches.clear()
    checkpoint = ["--resume_from_checkpoint", str(undisturbed / f"checkpoint-{step}")]
    resumed = train(*FLAGS, *SAVES, *checkpoint, data=weighted, output="resumed")
    assert batches == every[step:]
    assert losses(resumed) == losses(undisturbed) and same_weights(resumed, undisturbed)
    assert record(resumed)["summary"]["mixture"] == record(undisturbed)["summary"]["mixture"]


def test_a_resume_refuses_another_mixture(train, refused, files, weighted, tiny_models):
    folder = train(*FLAGS, *SAVES, "--max_steps", "1", data=weighted)
    flags = [*FLAGS, *SAVES, "--resume_from_checkpoint", "true", "--output_dir", str(folder), "--report_to", "none",
             "--model_name_or_path", tiny_models(), "--train_data_path"]  # fmt: skip
    assert "the order of rows" in refused(main_train.main, *flags, weighted.replace(":3", ":4"))
    assert "the order of rows" in refused(main_train.main, *flags, weighted, "--mixing_stop", "all_exhausted")
    assert "the order of rows" in refused(main_train.main, *flags, ",".join(files))


def test_a_curriculum_is_trained_in_its_order(train, files, batches):
    train(*FLAGS, "--curriculum", "length", "--num_train_epochs", "2", data=",".join(files))
    epochs = [sum(batches[:11], []), sum(batches[11:], [])]
    assert epochs[0] == epochs[1] and [source >> 40 for source in epochs[0]] == [0] * 14 + [1] * 9 + [2] * 21


def test_a_resume_refuses_other_numbers_of_a_curriculum(train, refused, tmp_path, tiny_models):
    rows = [{"instruction": f"q{i}", "output": "a", "hard": i} for i in range(8)]
    flags = [*FLAGS, *SAVES, "--curriculum", "column:hard"]
    folder = train(*flags, "--max_steps", "1", data=write_rows(tmp_path / "hard.jsonl", rows))
    write_rows(tmp_path / "hard.jsonl", [{**row, "hard": -row["hard"]} for row in rows])
    flags += ["--resume_from_checkpoint", "true", "--output_dir", str(folder), "--report_to", "none"]
    flags += ["--model_name_or_path", tiny_models(), "--train_data_path", str(tmp_path / "hard.jsonl")]
    assert "the order of rows" in refused(main_train.main, *flags)


def test_a_negative_seed_of_the_order(train, weighted, files, batches):
    orders = []
    for seed in ("-5", "-6"):
        train(*FLAGS, "--num_train_epochs", "1", "--data_seed", seed, data=weighted, output=f"mixed {seed}")
        orders.append(list(batches))
        batches.clear()
    assert orders[0] != orders[1]
    for more in (["--streaming", "true"], []):
        train(*FLAGS, "--max_steps", "1", "--data_seed", "-5", *more, data=",".join(files), output=f"{more}")


@pytest.mark.parametrize("flags", [["--packing", "true", "--padding_free", "true", "--max_len", "64"],
                                   ["--padding_free", "true"], ["--val_size", "0.2"]], ids=" ".join)  # fmt: skip
def test_with_packed_concatenated_and_held_back_rows(train, weighted, flags, batches):
    folder = train(*FLAGS, "--num_train_epochs", "1", "--mixing_stop", "all_exhausted", *flags, data=weighted)
    found = [source for batch in batches for source in batch]
    held = {"--val_size": 3 + 2 + 4}.get(flags[0], 0)
    assert len(set(found)) == sum(SIZES) - held and {source >> 40 for source in found} == {0, 1, 2}
    if held:
        assert record(folder)["data"]["eval"]["held_back"] == held


@pytest.mark.slow
@pytest.mark.usefixtures("fast_processes")
def test_two_processes_train_the_order_of_one_and_resume_bit_for_bit(train, weighted, tmp_path, tiny_models):
    flags = [*FLAGS, "--gradient_accumulation_steps", "1", "--lora_dropout", "0", *SAVES]
    run = ["main_train.py", "--deepspeed", "zero0", "--model_name_or_path", tiny_models(), "--train_data_path",
           weighted, "--report_to", "none", "--disable_tqdm", "true", "--card_samples", "0", *flags]  # fmt: skip
    undisturbed, resumed = tmp_path / "undisturbed", tmp_path / "resumed"
    for folder, more in ((undisturbed, []), (resumed, ["--resume_from_checkpoint", str(undisturbed / "checkpoint-9")])):
        done = two_processes([*run, "--output_dir", str(folder), *more])
        assert done.returncode == 0, done.stderr[-3000:]
    assert same_weights(undisturbed, resumed) and losses(undisturbed) == losses(resumed)
    alone = train(*flags, "--gradient_accumulation_steps", "2", data=weighted, output="alone")
    assert losses(undisturbed) == pytest.approx(losses(alone), abs=1e-4)
    assert record(undisturbed)["summary"]["mixture"] == record(alone)["summary"]["mixture"]


@pytest.mark.parametrize("stop", ["first_exhausted", "all_exhausted"])
def test_the_plan_has_the_rows_of_the_first_epoch(train, weighted, batches, parse, stop):
    folder = train(*FLAGS, "--num_train_epochs", "1", "--mixing_stop", stop, data=weighted)
    _, train_args = parse(*FLAGS, "--num_train_epochs", "1", "--output_dir", f"{folder} of the plan")
    expected = order(stop=stop)
    counts = numpy.ones(sum(SIZES), int)
    rows = Rows(counts, counts, counts, counts, 1, expected.indices(0))
    every = [(n << 40) + line for n, size in enumerate(SIZES) for line in range(1, size + 1)]
    updates = first_epoch(train_args, rows, 1)
    assert [[every[row] for step in update for batch in step for row in batch] for update in updates] == batches
    found = plan(train_args, rows, 0, 1, True)
    assert (found["rows"], found["steps"], found["rows_repeated"]) == (len(expected), len(losses(folder)), 0)
    of_two = first_epoch(train_args, rows, 2)
    assert sorted(row for update in of_two for step in update for batch in step for row in batch) == sorted(rows.order)


@pytest.mark.parametrize(("steps", "drop_last", "expected"), [(7, False, [10, 10, 4]), (6, False, [10, 10]),
                                                              (5, True, [8, 8, 4]), (1, False, [4])])  # fmt: skip
def test_rows_of_epochs(parse, steps, drop_last, expected):
    _, train_args = parse("--per_device_train_batch_size", "2", "--dataloader_drop_last", str(drop_last))
    assert rows_of_epochs(train_args, 10, 2, steps) == expected


@pytest.mark.parametrize("strategy", ["concat", "interleave"])
def test_a_plain_list_with_a_strategy(train, files, batches, strategy):
    flags = ["--num_train_epochs", "1", "--mixing_strategy", strategy]
    stop = ["--mixing_stop", "all_exhausted"] if strategy == "interleave" else []
    train(*FLAGS, *flags, *stop, data=",".join(files))
    found = sum(batches, [])
    assert found == places(order(strategy, (None,) * 3, **({"stop": "all_exhausted"} if stop else {})), 0)
    numbers = [source >> 40 for source in found]
    if strategy == "concat":
        assert sorted(found) == sorted(places(order("concat", (None,) * 3), 1)) and len(set(found)) == sum(SIZES)
    else:
        assert numbers == [0, 1, 2] * max(SIZES)
