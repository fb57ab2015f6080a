"""The command `doctor`: what it prints."""

import pytest
from doctor_case import DoctorCase, clean_and

from utils.script import doctor


def test_the_printed_report(tmp_path, tiny_models, monkeypatch, capsys):
    case = DoctorCase(tmp_path, tiny_models, monkeypatch)
    assert doctor.main(case.flags("--learning_rate", "0.5", rows=clean_and(output=""))) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "warning LEARNING_RATE_UNUSUAL"
    assert f"  {case.folder}/rows.jsonl: line 41" in lines
    assert lines[-2] == "looked at 41 training rows and 0 validation rows"
    assert lines[-1] == "verdict: 0 errors, 2 warnings, 0 notes – it will train; look at the warnings first"


@pytest.mark.parametrize("packing", ["false", "true"])
def test_rows_that_val_size_holds_back_count_as_validation_rows(tmp_path, tiny_models, monkeypatch, capsys, packing):
    case = DoctorCase(tmp_path, tiny_models, monkeypatch)
    doctor.main(case.flags("--val_size", "10", "--packing", packing, rows=clean_and(output="Yes, it is.")))
    assert "looked at 31 training rows and 10 validation rows" in capsys.readouterr().out


def test_help_and_the_commands_own_flags(capsys, refused):
    with pytest.raises(SystemExit) as stop:
        doctor.main(["--help"])
    assert stop.value.code == 0
    assert "--processes" in capsys.readouterr().out
    assert "--processes -1 is not allowed" in refused(doctor.main, "--processes", "-1")
