"""Examining a run: clean data has no findings, one problem hides no other, and main_train.py runs the quick checks."""

import json
from pathlib import Path

import pytest
import tiny
from doctor_case import CLEAN_PAIRS, WeightsReached, clean_and, on_a_full_disk

import main_train
from utils.args import parse_args
from utils.doctor import resources
from utils.doctor.examine import quick_findings
from utils.model import meta
from utils.model.tokenizer import load_run_tokenizer
from utils.tasks import get_task
from utils.template import get_template

ESTIMATED = resources.try_estimate


def test_clean_data_has_no_findings(case, report):
    assert report(*case.flags())[1]["findings"] == []
    assert report(*case.pairs(CLEAN_PAIRS))[1]["findings"] == []
    code, said = report(*case.flags("--val_size", "0.2"))
    assert (code, said["verdict"], said["examined"]["rows"]) == (0, "clean", 32)  # eight are held back


@pytest.mark.parametrize("recipe", ["sft", "pretrain", "dpo"])
def test_the_samples_are_ready_to_train(recipe, tmp_path, report):
    """They are of two languages, which is told; nothing stands against them."""
    flags = ("--output_dir", str(tmp_path / "run"), "--cache_dir", str(tmp_path / "cache"))
    code, said = report("--train_args_path", f"train_args/{recipe}/base.py", *flags)
    assert code == 0
    assert {finding["code"] for finding in said["findings"]} == {"LANGUAGES_MIXED"}


def test_broken_arguments_do_not_hide_the_rows(case, report):
    flags = case.flags("--lora_rank", "0", "--learning_rat", "1", "--max_grad_norm", "-1", rows=clean_and(output=""))
    (case.folder / "run").mkdir()
    (case.folder / "run" / "train.log").write_text("of another run")
    code, said = report(*flags)
    problems = [f["message"] for f in said["findings"] if f["code"] == "ARGUMENTS"]
    for part in ("--lora_rank 0", "--learning_rat is not a flag", "--max_grad_norm -1", "already holds 'train.log'"):
        assert sum(part in problem for problem in problems) == 1, problems
    assert [f["code"] for f in said["findings"] if f["code"] != "ARGUMENTS"] == ["ROW_NOTHING_TRAINED"]
    assert said["examined"]["set_aside"] == ["learning_rat", "lora_rank", "max_grad_norm", "output_dir"]


def test_rows_are_examined_without_a_model(case, report):
    code, said = report(*case.flags(rows=clean_and(output="Hel\u200blo."), model="nowhere/at/all"))
    assert {f["code"] for f in said["findings"]} == {"ARGUMENTS", "NOT_EXAMINED", "INVISIBLE_CHARACTERS"}
    assert (said["examined"]["model_name_or_path"], said["examined"]["rows"]) == (None, 41)
    code, said = report(*case.flags(rows=clean_and(output=""), model="nowhere/at/all"))
    assert [f["places"][0]["lines"] for f in said["findings"] if f["code"] == "ROW_NOTHING_TRAINED"] == [[41]]


def test_rows_are_examined_without_a_template(case, report):
    code, said = report(*case.flags("--template_name", "llama3", rows=clean_and(output="Hel\u200blo.")))
    assert code == 2
    assert [f["code"] for f in said["findings"]] == ["TEMPLATE_TOKEN_SPLIT", "INVISIBLE_CHARACTERS", "NOT_EXAMINED"]


@pytest.mark.parametrize("flags", [("--train_args_path", "nowhere.py"), ("--task_type", "dpo_multi")])
def test_rows_of_an_unknown_task_are_not_examined(case, report, flags):
    code, said = report(*case.flags(*flags))
    assert (code, [f["code"] for f in said["findings"]]) == (2, ["ARGUMENTS", "NOT_EXAMINED"])
    assert said["examined"]["rows"] == 0


def test_a_check_that_fails_stops_nothing(case, no_weights, report, monkeypatch):
    monkeypatch.setattr("utils.doctor.examine.template_findings", lambda *_: 1 / 0)
    code, said = report(*case.flags())
    assert (code, [f["code"] for f in said["findings"]]) == (0, ["NOT_EXAMINED"])
    assert "ZeroDivisionError" in said["findings"][0]["message"]
    with pytest.raises(WeightsReached):
        main_train.main(case.flags())


def test_a_check_that_fails_is_reported_without_its_stack(case, report, monkeypatch):
    def fail(*_):
        raise ValueError("too large\nException raised from unpack (most recent call first):\nframe #0")

    monkeypatch.setattr("utils.doctor.examine.template_findings", fail)
    _, said = report(*case.flags())
    assert said["findings"][0]["message"] == "the template: ValueError: too large"


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": -5},
        {"num_attention_heads": 0},
        {"model_type": "t5", "architectures": None},
        {"intermediate_size": 20},  # can be built, and is none that the weights fit
    ],
)
def test_a_model_that_cannot_be_built_is_an_error(case, report, changes):
    folder = Path(tiny.save_tiny_model(case.folder / "model"))
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    code, said = report(*case.flags(model=str(folder)))
    errors = [finding for finding in said["findings"] if finding["severity"] == "error"]
    assert (code, [finding["code"] for finding in errors]) == (2, ["ARGUMENTS"])
    assert str(folder) in errors[0]["message"]


def test_main_train_stops_on_errors_before_it_loads_weights(case, no_weights, refused):
    said = refused(main_train.main, *on_a_full_disk(case), "--template_name", "default")
    assert "DISK_TOO_SMALL: 3 checkpoints" in said
    assert "PAD_IS_STOP" not in said.partition("error: ")[2]  # a warning, in the log
    with pytest.raises(WeightsReached):
        main_train.main([*case.flags(), "--doctor", "off"])


def test_main_train_continues_with_warnings(case, no_weights, capsys):
    with pytest.raises(WeightsReached):
        main_train.main([*case.flags(), "--learning_rate", "0.5"])
    said = capsys.readouterr().err
    assert said.count("LEARNING_RATE_UNUSUAL") == 1
    assert "python -m utils.script.doctor" in said


def test_the_quick_checks_draw_no_random_numbers(case, monkeypatch):
    import torch

    monkeypatch.setattr(resources, "try_estimate", ESTIMATED)

    args, train_args = parse_args(case.flags())
    torch.manual_seed(1)
    wanted = torch.rand(3)
    torch.manual_seed(1)
    meta._SIZES.clear()
    quick_findings(args, train_args, None, None, tiny.byte_level_tokenizer())
    assert torch.equal(torch.rand(3), wanted)


def test_zero3_does_not_split_the_models_of_the_checks(case, monkeypatch):
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, is_deepspeed_zero3_enabled

    args, train_args = parse_args(case.flags())
    train_args.hf_deepspeed_config = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
    seen = []
    monkeypatch.setattr(
        "utils.doctor.examine.settings_findings", lambda *_: seen.append(is_deepspeed_zero3_enabled()) or []
    )
    quick_findings(args, train_args, None, None, tiny.byte_level_tokenizer())
    assert seen == [False]
    assert is_deepspeed_zero3_enabled()


def test_the_quick_checks_read_only_the_first_rows(tiny_models, rows_file, monkeypatch):
    """All rows would be read into memory, a million of them too; the settings are judged by how many there are."""
    args, train_args = parse_args(["--model_name_or_path", tiny_models(), "--train_data_path", rows_file])
    task, tokenizer = get_task(args.task_type), load_run_tokenizer(args)
    template = get_template(args.template_name, tokenizer)
    data = task.load_datasets(args, train_args, template, tokenizer)
    seen = {}
    monkeypatch.setattr(
        "utils.doctor.examine.token_findings", lambda dataset, *_: seen.update(tokens=len(dataset)) or []
    )
    monkeypatch.setattr(
        "utils.doctor.examine.settings_findings",
        lambda args, train_args, config, data, beginning, processes: (
            seen.update(rows=len(data.train), lengths=len(beginning.train)) or []
        ),
    )
    quick_findings(args, train_args, data, template, tokenizer, rows=2)
    assert seen == {"tokens": 2, "rows": len(data.train), "lengths": 2} and len(data.train) > 2
    quick_findings(args, train_args, data, template, tokenizer)
    assert seen["tokens"] == seen["lengths"] == len(data.train)
