"""The names of the sources of rows."""

import pytest
from conftest import write_rows

from utils.data.files import find_files
from utils.data.source_names import name_sources, short_names


@pytest.mark.parametrize(("entries", "names"), [
    (["data/maths.jsonl", "code.csv", "more/"], ["maths", "code", "more"]),
    (["x/maths.jsonl.gz", "y/facts.JSON.zst"], ["maths", "facts"]),
    (["x/rows.jsonl", "y/rows.jsonl", "z.jsonl"], ["x/rows", "y/rows", "z"]),
    (["/d/x/train.jsonl", "/d/y/train.jsonl"], ["x/train", "y/train"]),
    (["/e/a.csv", "/e/a.jsonl.gz", "/f/b.csv"], ["a.csv", "a.jsonl.gz", "b"]),
    (["x/a.csv", "y/a.csv", "x/a.jsonl"], ["x/a.csv", "y/a.csv", "x/a.jsonl"]),
    (["/p/x/train.csv", "/q/x/train.csv"], ["p/x/train", "q/x/train"]),
    (["a.csv", "a.csv"], ["a.csv", "a.csv"]),
    (["x/*.jsonl"], ["*"]),
])  # fmt: skip
def test_an_entry_is_named_by_its_last_part_or_the_shortest_end_that_differs(entries, names):
    assert short_names(entries) == names


def test_each_file_has_the_name_of_its_entry(tmp_path):
    (tmp_path / "more").mkdir()
    for name in ("b.jsonl", "more/c.jsonl", "more/a.jsonl"):
        write_rows(tmp_path / name, [{"instruction": "1", "output": "2"}])
    paths = f"{tmp_path / 'more'}, {tmp_path / 'b.jsonl'}"
    files, _ = find_files(paths, "--train_data_path")
    names = name_sources(paths, "--train_data_path", (".jsonl",), files)
    assert [(file.rsplit("/", 1)[1], name) for file, name in zip(files, names, strict=True)] == [
        ("a.jsonl", "more"), ("c.jsonl", "more"), ("b.jsonl", "b"),
    ]  # fmt: skip
