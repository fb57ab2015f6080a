"""Fixtures of the proofs' tests: main_train.py's flags, and the command's outcomes."""

import json

import pytest
from proving import IN_PROCESS

from utils.script import prove


@pytest.fixture
def flags(tiny_models, rows_file, tmp_path):
    return [
        "--model_name_or_path",
        tiny_models(),
        "--train_data_path",
        rows_file,
        "--cache_dir",
        str(tmp_path / "kept"),
    ]


@pytest.fixture
def proved(flags, capsys):
    """Runs the command; returns what each proof came to, by name, and the exit code."""

    def run(*more, only=IN_PROCESS):
        code = 0
        try:
            prove.main([*flags, *more, "--only", *only, "--json"])
        except SystemExit as stop:
            code = stop.code
        told = json.loads(capsys.readouterr().out)
        assert (code == 0) == told["holds"]
        return {proof["name"]: proof for proof in told["proofs"]}, code

    return run
