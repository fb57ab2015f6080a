"""`--config` with a file from someone else: no code of theirs runs, in any command."""

import json
import shutil
import sys

import pytest
from conftest import ROOT

import main_train
from utils.args import parse_args
from utils.runtime.errors import UserError
from utils.script import doctor, explain, plan_memory, prove, show_data

COMMANDS = {module.__name__: module.main for module in (main_train, explain, doctor, plan_memory, prove, show_data)}


@pytest.fixture
def evil(tmp_path):
    """A recipe that leaves a file when it is imported; the file."""
    mark = tmp_path / "ran"
    text = (ROOT / "train_args" / "sft" / "base.py").read_text()
    (tmp_path / "evil.py").write_text(f"{text}\nopen({str(mark)!r}, 'w').close()\n")
    return mark


@pytest.fixture
def theirs(tiny_models, rows_file, tmp_path):
    """Writes someone's train_args.json: `theirs(train_args_path="evil.py")` → its path."""

    def write(whole_record=True, **common):
        settings = {"model_name_or_path": tiny_models(), "train_data_path": rows_file, **common}
        path = tmp_path / "theirs.json"
        path.write_text(json.dumps({"common": settings, "trainer": {}} if whole_record else settings))
        return str(path)

    return write


@pytest.mark.parametrize("whole_record", [True, False], ids=["record", "flags"])
@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_runs_a_recipe_that_a_file_names(command, whole_record, theirs, evil, capsys, tmp_path):
    path = theirs(whole_record, train_args_path=str(tmp_path / "evil.py"))
    try:
        code = COMMANDS[command](["--config", path])  # the doctor and prove return their exit code
    except UserError as error:
        code, said = 2, str(error)
    else:
        said = capsys.readouterr().out
    assert code == 2 and f"give --train_args_path {tmp_path / 'evil.py'}" in said
    assert not evil.exists()


def test_a_recipe_that_is_typed_as_well_is_run(theirs, evil, tmp_path):
    recipe = str(tmp_path / "evil.py")
    parse_args(["--config", theirs(train_args_path=recipe), "--train_args_path", recipe])
    assert evil.exists()


@pytest.mark.parametrize("name", ["train_args/../../{evil}", "~/evil.py", "train_args/\0.py", "utils/args.py"])
def test_other_ways_out_of_the_recipes(theirs, evil, tmp_path, name, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    upward = "../" * len(ROOT.parts)
    with pytest.raises(UserError, match="is Python code outside of"):
        parse_args(["--config", theirs(train_args_path=name.format(evil=f"{upward}{tmp_path}/evil.py"))])
    assert not evil.exists()


def test_a_link_out_of_the_recipes(theirs, evil, tmp_path, monkeypatch):
    from utils.config import config_file

    (tmp_path / "project" / "train_args").mkdir(parents=True)
    (tmp_path / "project" / "train_args" / "mine.py").symlink_to(tmp_path / "evil.py")
    monkeypatch.setattr(config_file, "ROOT", tmp_path / "project")
    monkeypatch.setattr(config_file, "_RECIPES", tmp_path / "project" / "train_args")
    with pytest.raises(UserError, match="is Python code outside of"):
        parse_args(["--config", theirs(train_args_path="train_args/mine.py")])
    assert not evil.exists()


def test_a_relative_path_is_the_projects_own_whatever_lies_in_the_current_folder(theirs, evil, tmp_path, monkeypatch):
    folder = tmp_path / "train_args" / "sft"
    folder.mkdir(parents=True)
    (tmp_path / "evil.py").rename(folder / "base.py")
    monkeypatch.chdir(tmp_path)
    args, train_args = parse_args(["--config", theirs(train_args_path="train_args/sft/base.py")])
    assert not evil.exists()
    assert sys.modules[type(train_args).__module__].__file__ == str(ROOT / "train_args" / "sft" / "base.py")
    assert args.train_args_path == str(ROOT / "train_args" / "sft" / "base.py")  # as it can be read again from here


@pytest.fixture
def warnings():
    """What is logged as a warning."""
    from loguru import logger

    said = []
    number = logger.add(lambda line: said.append(str(line)), level="WARNING", format="{message}")
    yield said
    logger.remove(number)


def test_remote_code_is_not_taken_over(theirs, warnings):
    path = theirs(trust_remote_code=True, cache_dir="their/cache")
    args, _ = parse_args(["--config", path])
    assert args.trust_remote_code is False and args.cache_dir is None
    text = "".join(warnings)
    assert "trust_remote_code is ignored; give --trust_remote_code true to set it" in text
    assert "cache_dir is ignored; give --cache_dir their/cache to set it" in text
    warnings.clear()
    args, _ = parse_args(["--config", path, "--trust_remote_code", "true", "--cache_dir", "mine"])
    assert args.trust_remote_code is True and args.cache_dir == "mine" and warnings == []


def test_a_models_own_code_does_not_run_for_a_files_sake(theirs, tiny_models, tmp_path, refused):
    """A model whose configuration is a Python file beside it."""
    model = shutil.copytree(tiny_models(), tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.Config"}}
    (model / "config.json").write_text(json.dumps(config))
    mark = tmp_path / "ran"
    (model / "theirs.py").write_text(
        f"open({str(mark)!r}, 'w').close()\nfrom transformers import PretrainedConfig\n"
        "class Config(PretrainedConfig):\n    model_type = 'theirs'\n"
    )
    path = theirs(model_name_or_path=str(model), trust_remote_code=True)
    assert "needs --trust_remote_code true" in refused(main_train.main, "--config", path)
    assert not mark.exists()


def test_flags_in_a_file_neither_push_nor_replace(theirs, warnings, tmp_path):
    path = theirs(False, push_to_hub=True, overwrite_output_dir=True, output_dir=str(tmp_path / "run"))
    args, train_args = parse_args(["--config", path])
    assert not args.overwrite_output_dir and not train_args.push_to_hub
    assert train_args.output_dir == str(tmp_path / "run")
    assert "give --push_to_hub true" in "".join(warnings) and "give --overwrite_output_dir true" in "".join(warnings)


def test_comparing_with_a_run_imports_nothing(theirs, evil, tmp_path, train, capsys):
    from utils.script import compare_runs

    run = train("--max_steps", "1", "--card_samples", "0")
    record = json.loads((run / "train_args.json").read_text())
    record["common"] |= {"train_args_path": str(tmp_path / "evil.py"), "trust_remote_code": True}
    (run / "train_args.json").write_text(json.dumps(record))
    model, rows = (record["common"][name] for name in ("model_name_or_path", "train_data_path"))
    explain.main(["--model_name_or_path", model, "--train_data_path", rows, "--diff", str(run)])
    other = shutil.copytree(run, tmp_path / "other")
    record["common"]["train_args_path"] = "train_args/sft/base.py"
    (other / "train_args.json").write_text(json.dumps(record))
    compare_runs.main([str(run), str(other), "--output", str(tmp_path / "x.png")])
    assert capsys.readouterr().out.count("evil.py") == 2 and not evil.exists()
