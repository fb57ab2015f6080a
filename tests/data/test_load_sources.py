"""Sources are prepared one by one and joined: files, columns, templates, reports and validation rows."""

import json
from pathlib import Path

import pytest
from conftest import write_rows

from utils.args import parse_args
from utils.data.lengths import list_lengths
from utils.data.load_sources import refuse_unless_plain
from utils.data.places import decode_source
from utils.doctor.examine import _training_census
from utils.runtime.errors import UserError
from utils.tasks import get_task
from utils.template import get_template


def rows(name, count, **more):
    return [{"instruction": f"{name} {i}", "output": f"answer {i}", **more} for i in range(count)]


@pytest.fixture
def load(tiny_models, tmp_path, tokenizer):
    """Prepares a mixture as main_train.py does; returns the task's Data."""

    def run(text, *flags, task="sft"):
        (tmp_path / "mix.yaml").write_text(text)
        paths = ["--train_data_path", str(tmp_path / "mix.yaml"), "--output_dir", str(tmp_path / "run")]
        args, train_args = parse_args(
            ["--train_args_path", f"train_args/{task}/base.py", "--model_name_or_path", tiny_models(), *paths,
             "--cache_dir", str(tmp_path / "cache"), *flags]
        )  # fmt: skip
        template = get_template("qwen") if get_task(task if task != "dpo" else "dpo_single").uses_template else None
        return args.task.load_datasets(args, train_args, template, tokenizer)

    return run


@pytest.fixture
def files(tmp_path):
    folder = tmp_path / "more"
    folder.mkdir()
    write_rows(folder / "b.jsonl", [{"frage": f"b {i}", "antwort": "ja"} for i in range(10)])
    write_rows(folder / "c.jsonl", [{"frage": f"c {i}", "antwort": "nein"} for i in range(5)])
    a = write_rows(tmp_path / "a.jsonl", [*rows("a", 3), {"instruction": "empty", "output": ""}, *rows("a", 4)])
    return f"- path: {a}\n- path: {folder}\n  columns: {{instruction: frage, output: antwort}}\n  system: Be brief.\n"


def test_each_source_has_its_own_columns_and_system_message(load, files, tokenizer):
    data = load(files)
    assert data.source_names == ("a", "more", "more") and len(data.train) == 22
    assert [file.rsplit("/", 1)[1] for file in data.report.files] == ["a.jsonl", "b.jsonl", "c.jsonl"]
    assert (data.report.rows, data.report.kept, data.report.dropped_rows()) == (23, 22, 1)
    texts = tokenizer.batch_decode(list(data.train["input_ids"]))
    for text, source in zip(texts, data.train["source"], strict=True):
        file, line = decode_source(source[0])
        raw = json.loads(Path(data.report.files[file]).read_text().splitlines()[line - 1])
        assert f"{raw.get('instruction', raw.get('frage'))}<|im_end|>" in text
        assert ("Be brief." in text) == (file > 0)
    assert data.report.tokens == sum(list_lengths(data.train.data, "input_ids"))


def test_prepared_rows_of_a_source_are_found_again_in_another_mixture(load, files, tmp_path):
    load(files)
    before = sorted((tmp_path / "cache").iterdir())
    data = load(files.replace(f"- path: {tmp_path / 'a.jsonl'}\n", ""))
    assert sorted((tmp_path / "cache").iterdir()) == before and len(data.train) == 15


def test_a_share_of_every_source_is_held_back(load, files):
    data = load(files, "--val_size", "0.2")
    held = [decode_source(source[0])[0] for source in data.eval["source"]]
    assert (len([file for file in held if file == 0]), len(held), data.held_back) == (1, 4, 4)
    trained = {tuple(source) for source in data.train["source"]}
    assert len(trained) == 18 and not trained & {tuple(source) for source in data.eval["source"]}
    assert len(data.order) == 18 and data.rows_trained() == 18
    assert data.eval_source_names == data.source_names


def test_validation_files_are_read_as_without_a_mixture(load, files, tmp_path, tokenizer):
    evaluation = write_rows(tmp_path / "eval.jsonl", rows("e", 3))
    data = load(files, "--eval_data_path", evaluation)
    assert len(data.eval) == 3 and data.eval_report.files == [evaluation] and data.eval_source_names == ("eval",)
    assert not any("Be brief." in text for text in tokenizer.batch_decode(list(data.eval["input_ids"])))


def test_each_source_is_packed_by_itself(load, files):
    data = load(files, "--packing", "true", "--padding_free", "true", "--max_len", "100", "--val_size", "0.2")
    for row in [*data.train, *data.eval]:
        assert len({decode_source(source)[0] > 0 for source in row["source"]}) == 1
    packed = [source for row in data.train for source in row["source"]]
    assert len(packed) == len(set(packed)) == 18 and len(data.order) == len(data.train) < 18


def test_weights_of_messages_in_one_source_alone(load, tmp_path):
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A", "weight": 0.5}]
    a = write_rows(tmp_path / "a.jsonl", rows("a", 3))
    b = write_rows(tmp_path / "b.jsonl", [{"messages": turns}] * 2)
    data = load(f"- path: {a}\n- path: {b}\n")
    assert [weights is None for weights in data.train["loss_weights"]] == [True] * 3 + [False] * 2


@pytest.mark.parametrize("task", ["pretrain", "dpo"])
def test_of_every_task(load, tmp_path, task):
    texts = [{"text": f"text {i} of some words"} for i in range(6)]
    pairs = [{"prompt": f"Q {i}", "chosen": "yes", "rejected": "no"} for i in range(6)]
    parts = {"pretrain": texts, "dpo": pairs}[task]
    a, b = write_rows(tmp_path / "a.jsonl", parts[:2]), write_rows(tmp_path / "b.jsonl", parts[2:])
    packing = ["--packing", "false", "--padding_free", "false"] if task == "pretrain" else []
    data = load(f"- {{path: {a}, repeat: 2}}\n- path: {b}\n", *packing, task=task)
    assert data.order.counts == (4, 4) and [decode_source(row[0]) for row in data.train["source"]] == [
        (0, 1), (0, 2), (1, 1), (1, 2), (1, 3), (1, 4)
    ]  # fmt: skip


def test_the_doctor_reads_each_source_with_its_columns(load, files, tmp_path, tiny_models):
    load(files)
    flags = ["--model_name_or_path", tiny_models(), "--output_dir", str(tmp_path / "run")]
    args, _ = parse_args([*flags, "--train_data_path", str(tmp_path / "mix.yaml")])
    census = _training_census(args, None)
    places = [decode_source(source) for source in census.sources]
    assert places == [(file, line) for file, count in enumerate((8, 10, 5)) for line in range(1, count + 1)
                      if (file, line) != (0, 4)] + [] * len(census.problems)  # fmt: skip
    assert len(census.files) == 3 and {record.line for record in census.problems} <= {4}


def test_a_command_for_plain_files_refuses_a_mixture(files, tmp_path, tiny_models):
    (tmp_path / "mix.yaml").write_text(files)
    paths = ["--model_name_or_path", tiny_models(), "--output_dir", str(tmp_path / "run"), "--train_data_path"]
    with pytest.raises(UserError):
        refuse_unless_plain(parse_args([*paths, str(tmp_path / "mix.yaml")])[0], "a command")
    refuse_unless_plain(parse_args([*paths, str(tmp_path / "a.jsonl")])[0], "a command")


def test_problems_of_one_source_have_its_name(load, tmp_path):
    one = write_rows(tmp_path / "one.jsonl", rows("one", 1))
    many = write_rows(tmp_path / "many.jsonl", rows("many", 9))
    text = f"- path: {many}\n  name: first\n- path: {one}\n  name: second"
    for more, flags, first in (("\n  columns: {output: antwort}", [], "columns"), ("", ["--val_size", "0.5"], None)):
        with pytest.raises(UserError) as error:
            load(text + more, *flags)
        (problem,) = error.value.problems
        assert "of the source 'second'" in str(problem) and problem.flags[-1] == "train_data_path"
        assert problem.flags[0] == (first or "train_data_path")


def test_the_weight_of_an_only_source_has_no_effect(load, tmp_path):
    from loguru import logger

    lines = []
    sink = logger.add(lines.append, level="WARNING", format="{message}")
    path = write_rows(tmp_path / "one.jsonl", rows("one", 9))
    data = load(f"- path: {path}\n  weight: 0.7")
    logger.remove(sink)
    assert len(data.order) == 9
    assert sum("weight of the only source has no effect" in line for line in lines) == 1
