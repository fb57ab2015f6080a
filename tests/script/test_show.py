"""The commands that show formats and data."""

import re

import pytest
from conftest import write_rows

from utils.data.row_type import Sequence
from utils.script import show_data, show_template
from utils.template import template_dict


def test_the_catalogue_is_not_stale():
    """chat_template/README.md is what `show_template --write` would write."""
    assert show_template.CATALOGUE.read_text(encoding="utf-8") == show_template.catalogue()


@pytest.mark.parametrize("name", sorted(template_dict))
def test_show_template_prints_one(name, capsys):
    show_template.main(["--name", name])
    out = capsys.readouterr().out
    show_template.main(["--template_name", name])
    assert capsys.readouterr().out == out
    assert out.startswith(f"## {name}\n")
    assert template_dict[name].models[0] in out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--name", "qwem"], "--name 'qwem' is not a template. Did you mean 'qwen'"),
        (["--template_name", "qwem"], "--template_name 'qwem' is not a template. Did you mean 'qwen'"),
        (["--name", "auto"], "'auto' is the tokenizer's own chat template"),
        ([], "--write"),
    ],
)
def test_show_template_refuses(refused, flags, said):
    assert said in refused(show_template.main, *flags)


@pytest.fixture
def show(tiny_models, rows_file, tmp_path, capsys):
    def run(*flags):
        capsys.readouterr()
        show_data.main(["--model_name_or_path", tiny_models(), "--train_data_path", rows_file,
                        "--output_dir", str(tmp_path / "run"), *flags])  # fmt: skip
        assert not (tmp_path / "run").exists()
        return capsys.readouterr().out

    return run


def test_show_data_marks_what_is_trained(show):
    out = show("--rows", "1")
    assert "<|im_start|>assistant\n[[Paris.<|im_end|>]]\n" in out
    assert "8 of 8 rows are trained on, 0 left out" in out
    assert "█" in out


def test_show_data_has_ids_on_request(show):
    assert "labels [" in show("--ids", "true")
    assert "labels [" not in show()


def test_show_data_takes_the_training_commands_flags(show, refused):
    assert "User: What is the capital" in show("--template_name", "default", "--rows", "1")
    assert "Did you mean '--max_len'" in refused(show_data.main, "--max_lenn", "5")


def test_colour_is_for_terminals(tokenizer):
    ids = tokenizer("ab")["input_ids"]
    row = Sequence("", ids, ids, 0)
    assert show_data.mark_trained(row, tokenizer, colour=True) == "\x1b[32mab\x1b[0m"
    assert show_data.mark_trained(row, tokenizer, colour=False) == "[[ab]]"


def test_the_census_counts_every_row():
    text = show_data.census([1, 5, 5, 100], 1024)
    assert "1 to 100 tokens, mean 28, median 5" in text
    counts = [int(line.split("–")[1].split()[1]) for line in text.splitlines()[1:]]
    assert sum(counts) == 4
    assert counts[0] == 3


def test_95_percent_of_few_rows_are_all_of_them():
    from utils.script.show_data import census

    assert "median 204, 95 % up to 211" in census([198, 211], 512)
    assert "95 % up to 95" in census(list(range(1, 101)), 512)


def test_show_data_shows_a_mixture_in_the_order_of_its_first_epoch(show, tmp_path):
    for name in ("a", "b"):
        write_rows(tmp_path / f"{name}.jsonl", [{"instruction": f"{name} {i}", "output": "yes"} for i in range(4)])
    paths = f"{tmp_path / 'a.jsonl'},{tmp_path / 'b.jsonl'}"
    out = show("--train_data_path", paths, "--mixing_strategy", "interleave", "--rows", "4")
    places = re.findall(r"([ab])\.jsonl:\d", out)
    assert places[:4] == ["a", "b", "a", "b"]
    assert "a: 4 rows (50.0 %)" in out and "b: 4 rows (50.0 %)" in out
