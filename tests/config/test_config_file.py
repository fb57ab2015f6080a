"""`--config`: a run is repeated from its train_args.json, to the bit."""

import dataclasses
import json

import pytest
import tiny
from conftest import ROOT, write_rows

import main_train
from utils.args import CommonArgs, parse_args
from utils.config.config_file import read_config
from utils.config.flags import fits, hints_of
from utils.config.recipe import load_recipe
from utils.run.record import effective_args
from utils.runtime.errors import UserError

DPO = ["--train_args_path", "train_args/dpo/base.py"]
PRETRAIN = ["--train_args_path", "train_args/pretrain/base.py"]


def losses_of(folder):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [(entry["step"], name, entry[name]) for entry in history for name in ("loss", "eval_loss") if name in entry]


def weights_of(folder):
    return [path.read_bytes() for path in sorted(folder.glob("*.safetensors"))]


def record_of(folder) -> dict:
    return json.loads((folder / "train_args.json").read_text())


@pytest.mark.parametrize(
    "flags",
    [
        ["--precision", "fp32", "--lora_dropout", "0.1", "--val_size", "2"],
        ["--precision", "bf16", "--max_steps", "5"],
        ["--train_mode", "full", "--precision", "fp32", "--learning_rate", "1e-2", "--seed", "7"],
        [*DPO, "--precision", "fp32", "--beta", "0.3"],
        [*DPO, "--task_type", "dpo_single", "--train_mode", "full", "--precision", "bf16"],
        [*PRETRAIN, "--max_len", "64"],
    ],
    ids=["sft lora", "sft bf16", "sft full", "dpo lora", "dpo_single full", "pretrain"],
)
def test_a_run_is_repeated_to_the_bit(train, tmp_path, monkeypatch, flags):
    from utils.config import defaults

    monkeypatch.setattr(defaults, "device_has_bf16", lambda: True)
    rows = (
        tiny.PAIRS if DPO[1] in flags else [{"text": text} for text in tiny.TEXT] if PRETRAIN[1] in flags else tiny.ROWS
    )
    first = train(*flags, "--logging_steps", "1", data=write_rows(tmp_path / "data.jsonl", rows))
    again = tmp_path / "again"
    main_train.main(["--config", str(first / "train_args.json"), "--output_dir", str(again)])
    assert len(losses_of(first)) >= 4 and losses_of(again) == losses_of(first)
    assert weights_of(again) == weights_of(first)
    ours, theirs = record_of(again), record_of(first)
    for part, differs in (("common", {"config"}), ("trainer", {"output_dir"})):
        assert {name for name in theirs[part] if ours[part][name] != theirs[part][name]} == differs


@pytest.fixture
def run(copied):
    """A short run."""
    return copied("--max_steps", "1", "--lora_rank", "4")


@pytest.fixture
def changed(run, tmp_path):
    """A run's train_args.json with something changed: `changed(lambda record: …)` → its path."""

    def write(change):
        record = record_of(run)
        change(record)
        path = tmp_path / "changed.json"
        path.write_text(json.dumps(record))
        return str(path)

    return write


def test_flags_replace_what_the_file_says(run, tmp_path):
    args, train_args = parse_args(["--config", str(run), "--lora_alpha", "8", "--num_train_epochs", "3"])
    assert (args.lora_rank, args.lora_alpha) == (4, 8.0)
    assert (train_args.num_train_epochs, train_args.max_steps) == (3.0, -1)  # the steps of the file would win
    args, _ = parse_args(["--config", str(run), "--lora_rank", "16"])
    assert args.lora_rank == 16  # also where it is the default
    args, train_args = parse_args(["--config", str(run), "--precision", "fp32"])
    assert args.precision == "fp32" and not train_args.bf16
    args, train_args = parse_args(["--config", str(run), "--bf16", "false"])
    assert args.precision == "fp32"
    _, train_args = parse_args(["--config", str(run), "--gradient_checkpointing", "true"])
    assert train_args.activation_checkpointing
    args, train_args = parse_args(["--config", str(run), "--val_size", "2"])
    assert train_args.eval_strategy == "steps"  # the run had nothing to evaluate
    _, train_args = parse_args(
        ["--config", str(run), "--val_size", "2", "--early_stopping_patience", "2", "--save_strategy", "steps"]
    )
    assert train_args.load_best_model_at_end


def test_where_a_run_went_is_not_taken_over(run, changed):
    def change(record):
        record["trainer"] |= {"resume_from_checkpoint": "checkpoint-7", "local_rank": 3, "push_to_hub": True}
        record["common"]["overwrite_output_dir"] = True

    args, train_args = parse_args(["--config", changed(change)])
    assert train_args.output_dir.startswith("output/sft-") and train_args.resume_from_checkpoint is None
    assert not args.overwrite_output_dir and train_args.local_rank == -1 and not train_args.push_to_hub


def test_precision_is_what_it_was_or_told(run, changed, monkeypatch):
    from utils.config import defaults

    path = changed(lambda record: record["common"].update(precision="bf16"))
    monkeypatch.setattr(defaults, "device_has_bf16", lambda: False)
    with pytest.raises(UserError, match="bf16 was requested, which this device does not support"):
        parse_args(["--config", path])
    path = changed(lambda record: (record["common"].update(precision="fp32"), record["trainer"].update(bf16=False)))
    monkeypatch.setattr(defaults, "device_has_bf16", lambda: True)
    assert parse_args(["--config", path])[0].precision == "fp32"


@pytest.mark.parametrize(
    ("part", "name", "value", "said"),
    [
        ("common", "lora_rnak", 4, "'lora_rnak' is not a flag. Did you mean 'lora_rank'"),
        ("trainer", "group_by_length", True, "not a flag. It is --train_sampling_strategy group_by_length now"),
        ("trainer", "learning_rate", "fast", 'learning_rate is "fast"; give a number'),
        ("common", "lora_rank", 4.5, "lora_rank is 4.5; give a whole number"),
        ("common", "lora_rank", True, "lora_rank is true; give a whole number"),
        ("common", "use_dora", 1, "use_dora is 1; give true or false"),
        ("common", "train_mode", "lroa", "give one of full, lora, qlora"),
        ("common", "template_name", None, "template_name is null; give a text"),
        ("trainer", "max_length", 77, "--max_length has no effect here; use --max_len"),
        ("trainer", "per_device_train_batch_size", 0, "--per_device_train_batch_size 0 is not allowed"),
    ],
)
def test_a_file_that_cannot_be_used(changed, refused, part, name, value, said):
    path = changed(lambda record: record[part].update({name: value}))
    assert said in refused(main_train.main, "--config", path)


def test_problems_of_file_and_flags_come_together(changed, refused):
    path = changed(lambda record: record["common"].update(lora_rnak=4, use_dora="yes"))
    said = refused(main_train.main, "--config", path, "--lerning_rate", "1", "--max_len", "1")
    assert said.startswith("4 errors") and "lora_rnak" in said and "use_dora" in said and "--lerning_rate" in said


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "is not a file"),
        ("{", "is not JSON"),
        ("[]", "is not a JSON object"),
        ('{"common": {}}', "must be an object"),
        ('{"train_args_path": 5}', "train_args_path is 5"),
        ('{"train_args_path": null}', "train_args_path is None"),
    ],
)
def test_files_that_are_none(tmp_path, refused, content, said):
    path = tmp_path / "train_args.json"
    if content is not None:
        path.write_text(content)
    assert said in refused(main_train.main, "--config", str(path))


def test_a_list_of_another_type_is_named(changed, refused):
    path = changed(lambda record: record.update(resumed="broken"))
    assert "'resumed' must be a list" in refused(main_train.main, "--config", path)


@pytest.mark.parametrize("part", ["hardware", "base", "data", "start", "versions", "adapter"])
def test_a_part_of_another_type_is_named(changed, refused, part):
    path = changed(lambda record: record.update({part: "broken"}))
    assert f"{part!r} must be an object" in refused(main_train.main, "--config", path)


def test_a_misspelt_file_shows_its_neighbour(run, refused):
    assert "Did you mean" in refused(main_train.main, "--config", str(run / "train_arg.json"))


def test_an_object_of_flags(tiny_models, rows_file, tmp_path):
    path = tmp_path / "mine.json"
    flags = {"model_name_or_path": tiny_models(), "train_data_path": rows_file, "output_dir": str(tmp_path / "run")}
    path.write_text(json.dumps({**flags, "--learning_rate": 1e-5, "report_to": ["none"], "bf16": False}))
    args, train_args = parse_args(["--config", str(path), "--max_len=99"])
    assert (args.max_len, train_args.learning_rate, train_args.report_to) == (99, 1e-5, [])
    assert args.precision == "fp32" and train_args.output_dir == str(tmp_path / "run")


def test_other_versions_data_and_base_are_told(run, changed, tmp_path, rows_file, monkeypatch):
    from loguru import logger

    said = []
    number = logger.add(lambda line: said.append(str(line)), level="WARNING", format="{message}")
    parse_args(["--config", str(run)])
    assert said == []

    def change(record):
        record["versions"]["trl"] = "0.0.1"
        record["base"]["fingerprint"] = "abc"
        record["hardware"]["gpus"] = ["A GPU"]
        record["start"]["processes"] = 8
        record["resumed"] = [{"from": "x/checkpoint-2", "changed": {"seed": ["42", "7"]}}]
        record["common"]["train_data_path"] = record["data"]["train"]["files"][0]["file"] = rows_file

    path = changed(change)
    (tmp_path / "rows.jsonl").write_text((tmp_path / "rows.jsonl").read_text() + "\n")
    args, _ = parse_args(["--config", path])
    logger.remove(number)
    text = "".join(said)
    for part in ("trl was 0.0.1, is", "gpus was ['A GPU'], is none", "it had 8 processes, now 1",
                 "had the weights abc", "resumed with another seed",
                 "rows.jsonl' has changed since (sha256"):  # fmt: skip
        assert part in text, part
    said.clear()
    number = logger.add(lambda line: said.append(str(line)), level="WARNING", format="{message}")
    parse_args(["--config", str(run), "--train_data_path", write_rows(tmp_path / "other.jsonl", tiny.ROWS[:5])])
    logger.remove(number)
    assert said == []  # other rows were asked for


def test_a_run_that_was_stopped_can_be_repeated(run):
    (run / "train_args.json").rename(run / "train_args.json.part")
    assert parse_args(["--config", str(run)])[0].lora_rank == 4


@pytest.mark.parametrize("recipe", sorted(str(p) for p in (ROOT / "train_args").glob("*/*.py")))
def test_what_every_recipe_records_is_of_the_types_it_takes(recipe, tmp_path):
    train_args_type = load_recipe(recipe)
    for more in ({}, {"load_best_model_at_end": True, "save_strategy": "best", "torch_compile": False}):
        settings = effective_args(CommonArgs(), train_args_type(output_dir=str(tmp_path), use_cpu=True, **more))
        hints = hints_of((train_args_type, CommonArgs))
        for name, value in json.loads(json.dumps(settings["trainer"])).items():
            assert any(fits(value, hint) for hint in hints[name]), (name, value)
    fields = {field.name for field in dataclasses.fields(CommonArgs)}
    assert fields <= set(hints)


def test_a_run_notes_the_flag_it_was_repeated_by_and_no_more(run):
    assert "config" not in read_config(str(run)).values
