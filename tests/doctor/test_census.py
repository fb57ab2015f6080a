"""The census of all rows: which of them are duplicates."""

from conftest import write_rows

from utils.tasks import get_task


def test_of_equal_rows_all_but_the_first_are_duplicates(tmp_path):
    from utils.doctor.census import take_census
    from utils.doctor.rows import census_findings

    said = ["a", "a", "b", "a", "c", "b"]
    file = write_rows(tmp_path / "rows.jsonl", [{"instruction": f"Say {text}.", "output": text} for text in said])
    (finding,) = census_findings(take_census(file, "--train_data_path", get_task("sft"), workers=1), None)
    assert finding.code == "DUPLICATE_ROWS" and finding.message.startswith("3 rows of 6 repeat an earlier one")
    assert f"{file}:2 repeats {file}:1; the most frequent appears 3 times" in finding.message
    assert finding.places[file].lines == [2, 4, 6]
