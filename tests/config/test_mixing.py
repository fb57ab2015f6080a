"""Mixtures and curricula: settings that contradict each other are refused by name, before anything is read."""

import dataclasses
import json

import pytest
import tiny
from conftest import write_rows

from utils.config.config_file import ConfigFile
from utils.data.sources import read_sources
from utils.runtime.errors import UserError
from utils.storage.files import sha256_of

PAIRS = ["--train_args_path", "train_args/dpo/base.py"]


@pytest.fixture
def files(tmp_path):
    for name in ("a", "b"):
        write_rows(tmp_path / f"{name}.jsonl", tiny.ROWS)
    return tmp_path / "a.jsonl", tmp_path / "b.jsonl"


def refused_flags(parse, *flags):
    with pytest.raises(UserError) as error:
        parse(*flags)
    return [problem.flags[0] for problem in error.value.problems]


@pytest.mark.parametrize("flags", [
    ["--train_sampling_strategy", "group_by_length"], ["--train_sampling_strategy", "sequential"], ["--val_size", "3"],
    ["--curriculum", "length"], ["--precompute_ref_log_probs", "true", *PAIRS],
    ["--mixing_strategy", "concat"], ["--mixing_strategy", "interleave"],
], ids=" ".join)  # fmt: skip
def test_what_a_mixture_does_not_use_is_refused_by_name(parse, files, flags):
    weights = "{}:0.5,{}:0.5".format(*files)
    more = [flag for flag in flags if flag in PAIRS]
    args, _ = parse("--train_data_path", weights, *more)
    assert args.mixing_stop == "first_exhausted"
    assert flags[0].removeprefix("--") in refused_flags(parse, "--train_data_path", weights, *flags)


def test_streaming_refuses_a_mixture(parse, files):
    weights = "{}:0.5,{}:0.5".format(*files)
    assert refused_flags(parse, "--train_data_path", weights, "--streaming", "true") == ["train_data_path"]
    assert refused_flags(parse, "--streaming", "true", "--curriculum", "length") == ["curriculum"]


@pytest.mark.parametrize(("flags", "refused"), [
    (["--mixing_strategy", "weighted"], ["mixing_strategy"]),
    (["--mixing_unit", "tokens"], ["mixing_unit"]),
    (["--mixing_stop", "all_exhausted"], ["mixing_stop"]),
    (["--mixing_strategy", "interleave", "--mixing_unit", "tokens"], ["mixing_unit"]),
    (["--mixing_strategy", "concat", "--mixing_stop", "all_exhausted"], ["mixing_stop"]),
    (["--curriculum", "size"], ["curriculum"]), (["--curriculum", "column:"], ["curriculum"]),
    (["--curriculum", "length", "--train_sampling_strategy", "sequential"], ["train_sampling_strategy"]),
    (["--curriculum", "length", "--packing", "true", "--padding_free", "true"], ["packing"]),
])  # fmt: skip
def test_a_setting_without_effect_is_refused(parse, files, flags, refused):
    assert refused_flags(parse, "--train_data_path", "{},{}".format(*files), *flags) == refused


@pytest.mark.parametrize(("settings", "flags"), [
    ("repeat: 2", ["--mixing_strategy", "interleave"]), ("rows: 3", ["--packing", "true", "--padding_free", "true"]),
    ("columns: {outptu: answer}", []),
    ("system: Hi", ["--train_args_path", "train_args/pretrain/base.py"]),
    ("template_args: {a: 1}", ["--train_args_path", "train_args/pretrain/base.py"]),
])  # fmt: skip
def test_a_setting_of_a_source_that_is_not_used_is_refused(parse, files, tmp_path, settings, flags):
    mix = tmp_path / "mix.yaml"
    mix.write_text(f"- path: {files[0]}\n- path: {files[1]}\n  {settings}\n")
    assert refused_flags(parse, "--train_data_path", str(mix), *flags) == ["train_data_path"]


def test_a_source_without_its_file_is_refused_with_all_other_problems(parse, files):
    refused = refused_flags(parse, "--train_data_path", f"{files[0]}:1,{files[1]}x:1", "--val_size", "3")
    assert refused == ["train_data_path", "val_size"]


def test_config_notices_that_the_sources_have_changed(files, tmp_path):
    mix = tmp_path / "mix.yaml"
    mix.write_text(f"- path: {files[0]}\n- path: {files[1]}\n")
    known = [{"file": str(file), "sha256": sha256_of(str(file))} for file in files]
    sources = [dataclasses.asdict(source) for source in read_sources(str(mix))[0]]
    config = ConfigFile(record=json.loads(json.dumps({"data": {"train": {"files": known, "sources": sources}}})))
    assert config._other_files("train", str(mix)) == []
    mix.write_text(f"- path: {files[0]}\n  repeat: 2\n- path: {files[1]}\n")
    assert len(config._other_files("train", str(mix))) == 1


def test_weights_of_validation_rows_are_refused_by_name(parse, files, tmp_path):
    (tmp_path / "mix.yaml").write_text(f"- path: {files[1]}\n")
    for path in (f"{files[1]}:1", str(tmp_path / "mix.yaml")):
        with pytest.raises(UserError) as error:
            parse("--train_data_path", str(files[0]), "--eval_data_path", path)
        (problem,) = error.value.problems
        assert problem.flags[0] == "eval_data_path" and "for --train_data_path only" in str(problem)


def test_a_file_that_is_given_twice_is_one_problem(parse, files):
    with pytest.raises(UserError) as error:
        parse("--train_data_path", f"{files[0]}:1,{files[0]}:2")
    assert ["in two sources" in str(problem) for problem in error.value.problems] == [True]
