"""Logging: to the terminal from INFO on, everything to the run's file, and only from the main process."""

import logging
import os
import sys
import warnings

import pytest
from loguru import logger

from utils.runtime import log


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    """Handlers, filters and streams are the test session's again afterwards."""
    for name in ("RANK", "LOCAL_RANK", "TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.delenv(name, raising=False)
    stdout = sys.stdout
    with warnings.catch_warnings():
        yield
    if sys.stdout is not stdout:
        sys.stdout.close()
        sys.stdout = stdout
    logging.disable(logging.NOTSET)
    log.setup_logging()


def test_lines_before_the_file_are_written_into_it(tmp_path, capsys):
    log.setup_logging()
    logger.debug("early detail")
    logger.info("early line")
    file = tmp_path / "train.log"
    file.write_text("an earlier run\n")
    log.log_to_file(str(file))
    logger.debug("late detail")
    lines = file.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "an earlier run"
    assert [line.split(" | ", 2)[1:] for line in lines[1:]] == [
        ["DEBUG  ", "early detail"], ["INFO   ", "early line"], ["DEBUG  ", "late detail"],
    ]  # fmt: skip
    assert capsys.readouterr().err == "early line\n"


def test_a_second_run_in_one_process_does_not_repeat_the_lines_of_the_first(tmp_path):
    log.setup_logging()
    logger.info("of the first")
    log.setup_logging()
    logger.info("of the second")
    log.log_to_file(str(tmp_path / "train.log"))
    text = (tmp_path / "train.log").read_text()
    assert "of the second" in text and "of the first" not in text


@pytest.mark.parametrize("level", ["warning", "error"])
def test_of_a_library_only_errors_reach_the_terminal(level, tmp_path, capsys):
    log.setup_logging()
    log.log_to_file(str(tmp_path / "train.log"))
    getattr(logging.getLogger("transformers.trainer"), level)("%s rows", 3)
    recorded = {"warning": "DEBUG", "error": "WARNING"}[level]
    assert f"| {recorded: <7} | transformers.trainer: 3 rows" in (tmp_path / "train.log").read_text()
    assert ("3 rows" in capsys.readouterr().err) == (level == "error")


@pytest.mark.parametrize("variables", [{"RANK": "1", "LOCAL_RANK": "0"}, {"LOCAL_RANK": "1"}])
def test_other_processes_print_and_write_nothing(variables, tmp_path, capsys, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for name in ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, "0")
    log.setup_logging()
    log.log_to_file(str(tmp_path / "train.log"))
    logger.error("of another rank")
    print("of DeepSpeed")
    logging.getLogger("transformers").error("of a library")
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "") and not list(tmp_path.iterdir())
    assert os.environ["TQDM_DISABLE"] == "1"
