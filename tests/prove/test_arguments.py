"""The flags that proofs refuse."""

import pytest
import tiny
from conftest import write_rows

from utils.runtime.errors import UserError
from utils.script import prove


def test_all_wrong_flags_are_reported_at_once(flags, refused, tmp_path):
    said = refused(prove.main, *flags, "--only", "packd", "stops", "--rows", "1")
    assert "'packd' is not a proof. Did you mean 'packed'?" in said and "--rows 1 is not allowed" in said
    said = refused(prove.main, *flags, "--max_lenn", "3", "--lora_rank", "0")
    assert "--max_lenn is not a flag" in said and "--lora_rank 0" in said
    one = write_rows(tmp_path / "one.jsonl", tiny.ROWS[:1])
    assert "the proofs need two at least" in refused(prove.main, *flags, "--train_data_path", one)


def test_a_launcher_is_refused(flags, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="start it with plain python"):
        prove.main(flags)
