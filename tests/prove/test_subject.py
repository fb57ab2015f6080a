"""The rows that proofs run on."""

from pathlib import Path

from conftest import write_rows

from utils.prove.arguments import make_subject


def test_short_and_long_rows_are_chosen(tiny_models, tmp_path):
    rows = [{"instruction": "Hi", "output": "x " * n} for n in (5, 90, 3, 40, 3, 3, 20, 3)]
    flags = ["--model_name_or_path", tiny_models(), "--train_data_path", write_rows(tmp_path / "r.jsonl", rows)]
    subject = make_subject([*flags, "--cache_dir", str(tmp_path / "kept")], 3, tmp_path)
    lengths = [len(row["input_ids"]) for row in subject.rows]
    assert len(lengths) == 3 and max(lengths) > 90 > min(lengths)
    assert subject.raw_rows == [rows[line - 1] for _, line in map(prove_place, subject.rows)]
    assert Path(subject.rows_file(2)).read_text(encoding="utf-8").count("\n") == 2


def prove_place(row):
    return divmod(row["source"][0], 1 << 40)
