"""Paths, folders and globs become files; every kind of file gives the same rows; broken files name the line."""

import csv
import json

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
import tiny
from conftest import write_rows

from utils.data.files import TEXT_SUFFIXES, find_files, read_rows

ROWS = [{"instruction": 'Hi,\n"you"', "output": "Hello"}, {"instruction": "你好", "output": "再见"}]


def _write(path, rows):
    kind = path.suffix
    if kind == ".jsonl":
        write_rows(path, rows)
    elif kind == ".json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    elif kind == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["instruction", "output"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, suffix):
    file = _write(tmp_path / f"rows{suffix}", ROWS)
    assert [row.value for row in read_rows(file)] == ROWS


def test_line_ends_of_windows_end_lines_and_stay_within_cells(tmp_path):
    """As csv.writer has them: CRLF after each row; what a cell holds is read as it is."""
    rows = [["instruction", "output"], ["a\r\nb", "c\nd"], ["e", "f"]]
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    found = list(read_rows(str(tmp_path / "rows.csv")))
    assert [list(row.value.values()) for row in found] == rows[1:]
    (tmp_path / "rows.jsonl").write_bytes(b'{"text": "a\\r\\nb"}\r\n\r\n{"text": "c"}\r\n')
    assert [(row.line, row.value) for row in read_rows(str(tmp_path / "rows.jsonl"))] == [
        (1, {"text": "a\r\nb"}), (3, {"text": "c"}),
    ]  # fmt: skip


def test_text_files_are_split_at_blank_lines(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo\n\n\nthree\n")
    assert [(row.line, row.value["text"]) for row in read_rows(str(path))] == [(1, "one\ntwo"), (5, "three")]


@pytest.mark.parametrize(
    ("name", "content", "line", "said"),
    [
        ("a.jsonl", b'{"instruction": "a", "output": "b"}\n{"instruction": "a", "out', 2, "is not JSON"),
        ("a.jsonl", b'{"instruction": "a", "output": "b"}\n{"instruction": "\xff"}\n', 2, "is not UTF-8"),
        ("a.jsonl", '{"instruction": "a"}\n{"instruction": "b"}'.encode("utf-16"), 2, "is not UTF-8; save"),
        ("a.json", b'[{"instruction": "a"}, {"instr', 1, "is not JSON"),
        ("a.csv", b"instruction,output\na\n", 2, "cells"),
        ("a.csv", b"instruction,output\na,b\na,b,c\n", 3, "another number of cells than the header (2)"),
        ("a.csv", b'instruction,output\na,b\n"a"x,b\n', 3, "is not CSV"),
        ("a.parquet", b"PAR1 half", 0, "Parquet"),
    ],
)
def test_broken_files_name_the_line(tmp_path, name, content, line, said):
    path = tmp_path / name
    path.write_bytes(content)
    last = list(read_rows(str(path)))[-1]
    assert last.line == line and said in last.problem


def test_a_file_that_is_named_twice_is_told_since_it_would_count_once(tmp_path):
    (tmp_path / "a.jsonl").write_text("x")
    files, problems = find_files(f"{tmp_path}/a.jsonl,{tmp_path}/a.jsonl", "--train_data_path")
    assert len(files) == 1 and "/a.jsonl' 2 times, and a file is read once; name it once" in str(problems[0])


def test_paths_are_files_folders_and_globs_mixed(tmp_path):
    inner = tmp_path / "in"
    inner.mkdir()
    for path in (tmp_path / "a.jsonl", inner / "b.csv", inner / "c.json", inner / "notes.md"):
        path.write_text("x")
    files, problems = find_files(f"{tmp_path}/a.jsonl, {inner}, {tmp_path}/*.jsonl", "--train_data_path")
    assert not problems
    assert files == [str(tmp_path / "a.jsonl"), str(inner / "b.csv"), str(inner / "c.json")]


def test_a_link_to_nowhere_says_where(tmp_path):
    (tmp_path / "rows.jsonl").symlink_to(tmp_path / "gone.jsonl")
    _, problems = find_files(str(tmp_path / "rows.jsonl"), "--train_data_path", (".jsonl",))
    said = str(problems[0])
    assert "is a link to" in said and "gone.jsonl" in said and "Did you mean" not in said


def test_what_may_not_be_read_is_named(tmp_path, monkeypatch):
    file = write_rows(tmp_path / "rows.jsonl", [{"instruction": "a", "output": "b"}])
    monkeypatch.setattr("utils.data.files.os.access", lambda *_: False)
    _, problems = find_files(file, "--train_data_path", (".jsonl",))
    assert [str(problem).partition(";")[0] for problem in problems] == [
        f"--train_data_path {file!r} may not be read by this user"
    ]
    _, problems = find_files("x" * 300 + ".jsonl", "--train_data_path", (".jsonl",))
    assert "cannot be read: File name too long" in str(problems[0])


def test_every_wrong_path_is_named(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "void").mkdir()
    (tmp_path / "notes.md").write_text("x")
    (tmp_path / "rows.jsonl").write_text("x")
    wrong = ["rows.jsnl", "empty.jsonl", "void", "notes.md", "*.csv"]
    _, problems = find_files(",".join(str(tmp_path / name) for name in wrong), "--train_data_path")
    said = ["Did you mean", "is empty", "without any", "kinds of file", "matches no file"]
    assert len(problems) == len(wrong)
    for problem, name, reason in zip(problems, wrong, said, strict=True):
        assert problem.flags == ("train_data_path",)
        assert reason in str(problem)
        assert name in str(problem)


@pytest.mark.parametrize("spelling", ["{0}/./a.jsonl", "{0}/in/../a.jsonl", "{0}/link.jsonl", "{0}/hard.jsonl"])
def test_one_file_by_two_spellings_is_refused(tmp_path, spelling):
    (tmp_path / "in").mkdir()
    file = tmp_path / "a.jsonl"
    file.write_text("x")
    (tmp_path / "link.jsonl").symlink_to(file)
    (tmp_path / "hard.jsonl").hardlink_to(file)
    other = spelling.format(tmp_path)
    files, (problem,) = find_files(f"{file},{other}", "--train_data_path")
    assert files == [str(file)]
    assert f"names {str(file)!r} and {other!r}, which are one file, 2 times" in str(problem)


def test_a_file_found_in_two_ways_is_read_once(tmp_path):
    write_rows(tmp_path / "a.jsonl", tiny.ROWS)
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "a.jsonl")
    assert find_files(f"{tmp_path},{tmp_path}/*.jsonl", "--train_data_path") == ([str(tmp_path / "a.jsonl")], [])


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".txt"])
def test_a_compressed_file_is_read_as_it_is_uncompressed(tmp_path, kind, suffix):
    texts = {
        ".jsonl": '\ufeff{"instruction": "Hi", "output": "你好"}\n{"instruction": "Ho", "output": "Hello"}\n',
        ".json": '[{"instruction": "Hi", "output": "你好"},\n{"instruction": "Ho", "output": "Hello"}]',
        ".csv": 'instruction,output\nHi,你好\nHo,"Hello\nthere"\n',
        ".txt": "one\ntwo\n\nthree\n",
    }
    plain, compressed = tmp_path / f"rows{kind}", tmp_path / f"rows{kind.upper()}{suffix}"
    plain.write_bytes(texts[kind].encode())
    compress = {".gz": "gzip", ".zst": "zstd"}[suffix]
    with pyarrow.output_stream(str(compressed), compression=compress) as stream:
        stream.write(texts[kind].encode())
    read = [(raw.line, raw.value, raw.problem) for raw in read_rows(str(compressed))]
    assert len(read) == 2 and read == [(raw.line, raw.value, raw.problem) for raw in read_rows(str(plain))]
    assert find_files(str(compressed), "--train_data_path", TEXT_SUFFIXES) == ([str(compressed)], [])


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_compressed_file_that_is_damaged_stops_the_run(tmp_path, suffix):
    path = tmp_path / f"rows.jsonl{suffix}"
    lines = "".join(
        json.dumps({"instruction": f"{number}?", "output": str(number**7)}) + "\n" for number in range(5000)
    )
    with pyarrow.output_stream(str(path), compression={".gz": "gzip", ".zst": "zstd"}[suffix]) as stream:
        stream.write(lines.encode())
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"not compressed at all"):
        path.write_bytes(damaged)
        *_, last = read_rows(str(path))
        assert last.fatal and last.problem.startswith("cannot be read: ")


def test_parquet_and_arrow_are_not_read_compressed_a_second_time(tmp_path):
    for name in ("rows.parquet.gz", "rows.arrow.zst", "rows.tar.gz"):
        (tmp_path / name).write_bytes(b"x")
        files, (problem,) = find_files(str(tmp_path / name), "--train_data_path")
        assert not files and "is not one of the kinds of file this task reads: " in str(problem)
        assert "text also as .gz or .zst" in str(problem)


@pytest.mark.parametrize("form", ["stream", "file"])
def test_an_arrow_file_is_read_in_both_forms(tmp_path, form):
    table = pyarrow.Table.from_pylist([{"instruction": "Hi", "output": "Hello"}, {"instruction": "Ho", "output": None}])
    path = tmp_path / "rows.arrow"
    with getattr(pyarrow.ipc, f"new_{form}")(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=1)
    assert [(raw.line, raw.value) for raw in read_rows(str(path))] == list(enumerate(table.to_pylist(), 1))
    path.write_bytes(path.read_bytes()[:200])
    *_, last = read_rows(str(path))
    assert last.fatal and "is not a whole Arrow file" in last.problem
