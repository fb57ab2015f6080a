"""The benchmark of preparing: its cases run on a few rows, and its ratios are speeds."""

import shutil

from conftest import write_rows

from benchmarks import preparing
from benchmarks.tables import table_in
from utils.storage.files import ROOT
from utils.template import get_template


def test_a_ratio_is_one_of_speeds():
    repeats = [{"a": {"seconds": 2.0}, "b": {"seconds": 1.0}}, {"a": {"seconds": 1.0}, "b": {"seconds": 3.0}}]
    assert preparing.ratios(repeats, "a", "b", "seconds") == [0.5, 3.0]


def test_all_cases_run_and_make_a_table(tiny_models, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [{"instruction": row, "output": "Yes."} for row in ("a", "b", "c")])
    model = shutil.copytree(tiny_models(), tmp_path / "model")
    (model / "chat_template.jinja").write_text(get_template("qwen").to_jinja(), encoding="utf-8")
    found = preparing.measure(tmp_path / "rows.jsonl", str(model), "qwen", 2, 1, 2)
    assert rows and found["rows"] == 2 and found["tokens"] > 10
    assert [sorted(repeat) for repeat in found["repeats"]] == [["auto", "registered", "tokenizer"]] * 2
    assert all(time > 0 for repeat in found["repeats"] for case in repeat.values() for time in case.values())
    assert len(preparing.table(found).splitlines()) == 2 + len(preparing.GOALS) + 2


def test_the_table_on_the_page_is_that_of_the_results():
    results = preparing.json.loads(preparing.RESULTS.read_text(encoding="utf-8"))
    assert table_in(ROOT / "benchmarks" / "README.md", "results/preparing.json") == preparing.table(results)
