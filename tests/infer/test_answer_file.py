"""A file of answers: continued with the same settings, refused with others, sorted at the end."""

import json
from pathlib import Path

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


@pytest.mark.parametrize("left", range(0, 130, 9))
def test_any_beginning_of_a_file_is_continued(tmp_path, left):
    def write(file, numbers):
        for number in numbers:
            file.write(number, {"answer": f"第{number}"})
        return file

    path, wanted = str(tmp_path / "a.jsonl"), {0, 1, 2, 3}
    write(AnswerFile(path, {"--seed": 1}, wanted), [2, 0]).close()
    partial = Path(f"{path}.partial")
    partial.write_bytes(partial.read_bytes()[:left])
    file = AnswerFile(path, {"--seed": 1}, wanted)
    assert file.done <= {2, 0} and (left < 115 or file.done)
    write(file, [number for number in (3, 2, 1, 0) if number not in file.done]).finish()
    assert Path(path).read_text(encoding="utf-8").splitlines() == [f'{{"answer": "第{number}"}}' for number in range(4)]
    assert not partial.exists()


def test_a_full_disk_is_reported_with_the_remedy(tmp_path):
    file = AnswerFile(str(tmp_path / "a.jsonl"), {}, {1})
    file._file.close()
    file._file = open("/dev/full", "ab")  # noqa: SIM115
    with pytest.raises(UserError, match="No space left on device. Free some space; the same command then continues"):
        file.write(1, {"answer": "x"})
