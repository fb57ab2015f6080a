"""All proofs of one command: each holds on a correct project, and one that breaks ends no other."""

import tempfile

import pytest
import tiny
from conftest import write_rows
from proving import IN_PROCESS, holding


def test_all_proofs_hold_and_no_file_is_left(proved, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    proofs, code = proved("--lora_dropout", "0.3", "--output_dir", str(tmp_path / "run"), only=IN_PROCESS[:5])
    assert code == 0 and holding(proofs) == dict.fromkeys(IN_PROCESS[:5], True)
    loss, norm, one = proofs["padding_free"]["measures"]
    assert loss["what"] == "loss" and loss["expected"] == pytest.approx(loss["found"], rel=1e-5)
    assert norm["expected"] > 0 and one["what"].startswith("gradient of ")
    assert not (tmp_path / "run").exists() and not any((tmp_path / "scratch").glob("llm_dojo-prove-*"))


@pytest.mark.parametrize("how", [["--task_type", "dpo_single"], ["--task_type", "dpo_multi", "--train_mode", "full"]])
def test_proofs_of_preferences(proved, tmp_path, how):
    pairs = write_rows(tmp_path / "pairs.jsonl", tiny.PAIRS)
    recipe = ["--train_args_path", "train_args/dpo/base.py", "--train_data_path", pairs]
    proofs, code = proved(*recipe, *how)
    single, lora = "dpo_single" in how, "full" not in how
    expected = {"padding_free": single or None, "packed": None, "accumulation": True, "stops": None}
    assert code == 0 and holding(proofs) == expected | dict.fromkeys(("adapter_off", "merged"), lora or None)
    loss = proofs["accumulation"]["measures"][0]["expected"]
    assert abs(loss - 0.693147) > 1e-4  # at the start it is ln 2, whatever the rows


def test_a_proof_that_raises_does_not_end_the_others(proved, monkeypatch):
    def broken(subject):
        raise ValueError("no such\nform")

    monkeypatch.setattr("utils.prove.batch_checks._pack", broken)
    proofs, code = proved(only=["packed", "accumulation"])
    assert code == 1 and holding(proofs) == {"packed": False, "accumulation": True}
    assert proofs["packed"]["failure"] == "ValueError: no such form"
