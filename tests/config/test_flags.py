"""Flags from dataclasses: how a command line is split, read and reported."""

import dataclasses

import pytest

from utils.config.flags import arg, flags_in, make_parser, read_flags, split_flags, split_own, suggest_flag, value_of


@dataclasses.dataclass
class Own:
    rank: int = arg(4, "A number.")
    name: str = arg("a", "A text.")
    on: bool = arg(False, "A switch.")


def test_words_are_grouped_by_flag():
    assert split_flags(["--a", "1", "2", "--b", "stray"]) == [["--a", "1", "2"], ["--b", "stray"]]
    assert split_flags(["stray", "--a"]) == [["stray"], ["--a"]]


@pytest.mark.parametrize(
    ("argv", "value"),
    [
        (["--rank", "8"], "8"),
        (["--rank=8"], "8"),
        (["--rank", "8", "--rank", "9"], "9"),
        (["--rank"], ""),
        (["rank", "8"], None),  # a stray word is no flag
        (["--ranks", "8"], None),
    ],
)
def test_a_flag_is_read_before_there_is_a_parser(argv, value):
    assert value_of(argv, "rank") == value


def test_every_wrong_flag_is_reported():
    parser = make_parser([Own], "own", "A command.")
    values, given, problems = read_flags(parser, ["--rank", "x", "--nmae", "b", "--name", "c", "--on"])
    assert (values["rank"], values["name"], values["on"], given) == (4, "c", True, {"name", "on"})
    assert [problem.flags for problem in problems] == [("rank",), ("nmae",)]
    assert "'x' is not a number (int)" in str(problems[0]) and "Did you mean '--name'" in str(problems[1])


def test_a_commands_own_flags_are_separated():
    assert split_own(["--rank=2", "--seed", "7", "--on", "--help"], Own) == (
        ["--rank=2", "--on", "--help"],
        ["--seed", "7"],
    )


def test_what_is_suggested():
    assert suggest_flag("--lora_rnak", ["--lora_rank"]) == " Did you mean '--lora_rank'?"
    known = ["--train_sampling_strategy"]
    assert suggest_flag("--group_by_length", known) == " It is --train_sampling_strategy group_by_length now."
    assert suggest_flag("--zzz", known) == ""


def test_flags_that_an_error_of_transformers_names():
    assert flags_in(ValueError("--a_b requires --c to match")) == ("a_b", "c")
