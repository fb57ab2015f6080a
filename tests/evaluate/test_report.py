"""The written results."""

import pytest
from quiz import evaluate_rows

from utils.evaluate import metrics


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
