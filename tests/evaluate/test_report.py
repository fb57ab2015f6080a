"""The written results."""

import pytest
from quiz import evaluate_rows

from utils.evaluate import metrics
from utils.evaluate.report import check_output


@pytest.mark.parametrize("said", ["", "Hello! 好。"], ids=["empty", "some"])
@pytest.mark.parametrize("rows", [
    [{"instruction": "Hi", "output": "Hello!"}], [{"instruction": "再见", "output": "好。"}],
    [{"instruction": "Hi", "output": "Hello!"}, {"instruction": "再见", "output": "好。"}],
    [{"instruction": "Hi", "output": "?!"}, {"instruction": "Hi", "output": "x"}],
], ids=["one English row", "one Chinese row", "mixed", "signs"])  # fmt: skip
def test_the_files_are_written_for_any_rows(rows, said, tiny_models, tmp_path, capsys, monkeypatch):
    """Each score of sacrebleu is as if it were the first one that the process computes."""
    for cached in (metrics._bleu, metrics._chrf, metrics._rouge):
        cached.cache_clear()
    monkeypatch.setattr(
        "utils.evaluate.evaluate.answer_with", lambda task, one, encoded, args: dict.fromkeys(encoded, said)
    )
    lines, summary, out, _ = evaluate_rows(tmp_path, capsys, tiny_models(), rows, "--template_name", "qwen")
    assert len(lines) == summary["rows"] == len(rows)
    figures = summary["figures"][next(iter(summary["figures"]))]
    assert {name for name in figures if "bleu" in name} | {"chrf"} == set(summary["sacrebleu"])
    assert "ROUGE-L" in out


@pytest.mark.parametrize("name", ["out.jsonl", "out.summary.json"])
def test_an_input_is_never_the_output_or_its_summary(tmp_path, name):
    """Also through a link; `out.jsonl` and `out.summary.json` are written together."""
    rows = tmp_path / "rows.json"
    rows.write_text("[]", encoding="utf-8")
    (tmp_path / name).hardlink_to(rows)
    (problem,) = check_output(str(tmp_path / "out.jsonl"), overwrite=True, read=[str(rows)])
    assert f"{name}' is one of the files of --eval_data_path" in problem
    assert check_output(str(tmp_path / "other.jsonl"), overwrite=True, read=[str(rows)]) == []
