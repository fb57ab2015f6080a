"""Which folder a run may write into."""

from parsing import problems_of

import main_train
from utils.storage.run_folder import RECORD_FILE

DPO = ["--train_args_path", "train_args/dpo/base.py"]


def test_a_finished_run_is_not_trained_over(parse, tmp_path):
    (tmp_path / "run").mkdir()
    parse()
    (tmp_path / "run" / RECORD_FILE).write_text("{}")
    assert "--overwrite_output_dir true" in problems_of(parse)[0]
    parse("--overwrite_output_dir", "true")


def test_a_folder_that_cannot_be_written(parse, tmp_path):
    (tmp_path / "file").write_text("")
    assert "is a file" in problems_of(parse, "--output_dir", str(tmp_path / "file"))[0]
    assert "cannot be written" in problems_of(parse, "--output_dir", "/proc/run")[0]
    assert "--cache_dir '/proc/cache' cannot be written" in problems_of(parse, "--cache_dir", "/proc/cache")[0]
    assert "cannot be written" in problems_of(parse, "--output_dir", str(tmp_path / "file" / "run"))[0]


def test_the_folder_a_run_starts_from_is_never_written(refused, train):
    tuned = train("--save_strategy", "epoch")
    before = sorted(str(path) for path in tuned.rglob("*"))
    checkpoint = max(tuned.glob("checkpoint-*"))
    for start in (tuned, checkpoint):
        flags = ["--adapter_name_or_path", str(start), "--output_dir", str(tuned), "--overwrite_output_dir", "true"]
        assert "the folder that training starts from" in refused(main_train.main, *DPO, *flags)
    assert sorted(str(path) for path in tuned.rglob("*")) == before
