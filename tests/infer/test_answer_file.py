"""A file of answers: continued with the same settings, refused with others, sorted at the end."""

import json

import pytest

from utils.infer.answer_file import AnswerFile, differences
from utils.runtime.errors import UserError


def test_answers_are_continued_and_sorted(tmp_path):
    path = tmp_path / "answers.jsonl"
    file = AnswerFile(str(path), {"--seed": 1}, {0, 1, 2})
    file.write(2, {"answer": "c"})
    file.write(0, {"answer": "a"})
    file.close()
    with (tmp_path / "answers.jsonl.partial").open("ab") as torn:
        torn.write(b'{"number": 1, "row"')
    again = AnswerFile(str(path), {"--seed": 1}, {0, 1, 2})
    assert again.done == {0, 2} and not path.exists()
    again.write(1, {"answer": "b"})
    again.finish()
    assert [json.loads(line)["answer"] for line in path.read_text().splitlines()] == ["a", "b", "c"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["answers.jsonl"]


def test_other_settings_are_refused_or_start_anew(tmp_path):
    path = str(tmp_path / "answers.jsonl")
    file = AnswerFile(path, {"--seed": 1}, {0})
    file.write(0, {"answer": "a"})
    file.close()
    with pytest.raises(UserError, match="--seed was 1 and is 2"):
        AnswerFile(path, {"--seed": 2}, {0})
    assert AnswerFile(path, {"--seed": 2}, {0}, overwrite=True).done == set()


def test_differences():
    assert differences({"a": 1, "b": 2}, {"a": 1, "c": 3}) == "b was 2 and is None; c was None and is 3"
