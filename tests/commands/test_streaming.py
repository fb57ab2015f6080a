"""The commands before a training, with `--streaming true`: they look at the first rows, and say so."""

import json

import pytest
from conftest import write_rows

from utils.data import stream
from utils.script import doctor, explain, show_data

ROWS = [{"instruction": f"Question {i}", "output": f"Answer {i}" if i != 2 else ""} for i in range(12)]


@pytest.fixture
def flags(tiny_models, tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "SAMPLE_ROWS", 5)
    return ["--model_name_or_path", tiny_models(), "--train_data_path", write_rows(tmp_path / "a.jsonl", ROWS),
            "--streaming", "true", "--per_device_train_batch_size", "2", "--num_train_epochs", "1",
            "--output_dir", str(tmp_path / "run")]  # fmt: skip


def test_show_data_counts_the_first_rows(flags, capsys):
    show_data.main([*flags, "--rows", "1"])
    shown = capsys.readouterr().out
    assert "streamed: of 12 rows the first 5 are counted here" in shown
    assert "4 of 5 rows are trained on, 1 left out" in shown


def test_explain_plans_all_rows_from_the_first(flags, capsys):
    explain.main(flags)
    assert "12 are streamed" in (shown := capsys.readouterr().out) and "estimated from the first 4" in shown
    explain.main([*flags, "--json", "true"])
    plan = json.loads(capsys.readouterr().out)["plan"]
    assert (plan["rows"], plan["steps"], plan["rows_per_update"]["smallest"]) == (12, 6, 2)


def test_explain_refuses_more_rows_than_it_can_list(flags, refused, monkeypatch):
    from utils.explain import explain as module

    monkeypatch.setattr(module, "_MAX_STREAMED", 11)
    assert "12 rows of --train_data_path are too many to plan" in refused(explain.main, *flags)


def test_the_doctor_looks_at_the_first_rows(flags, capsys):
    assert doctor.main([*flags, "--json", "true"]) == 1  # a row is dropped
    found = json.loads(capsys.readouterr().out)
    assert found["examined"]["rows"] == 5
    findings = {finding["code"]: finding["message"] for finding in found["findings"]}
    assert "all rows but the first 5" in findings["NOT_EXAMINED"]
    assert any("nothing" in message or "empty" in message for message in findings.values())
