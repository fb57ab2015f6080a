"""Fixtures of explain's tests: flags of a run, its explanation, and the run itself."""

import json
from pathlib import Path

import pytest
import tiny
from conftest import write_rows
from explaining import DPO, PRETRAIN

import main_train
from utils.args import parse_with_sources
from utils.explain.explain import explain

TEXTS = [{"text": text[: 20 * number]} for number in range(1, 6) for text in tiny.TEXT[:2]]


def rows_for(flags, path) -> str:
    return write_rows(path, tiny.PAIRS if DPO[1] in flags else TEXTS if PRETRAIN[1] in flags else tiny.ROWS)


@pytest.fixture
def flags_for(tiny_models, tmp_path):
    """A whole command line, with a model, rows that suit the task, and a folder that is not there yet."""

    def build(*flags, folder="explained"):
        data = rows_for(flags, tmp_path / "rows.jsonl")
        paths = ["--model_name_or_path", tiny_models(), "--train_data_path", data]
        return [*paths, "--output_dir", str(tmp_path / folder), "--report_to", "none", *flags]

    return build


@pytest.fixture
def explained(flags_for):
    """What is found out of a command line."""

    def run(*flags, processes=1):
        return explain(*parse_with_sources(flags_for(*flags)), processes)

    return run


@pytest.fixture
def train_explained(flags_for):
    """A run's history by the same flags, every step of it logged; its folder."""

    def run(*flags, folder="trained"):
        more = ["--logging_steps", "1", "--disable_tqdm", "true", "--card_samples", "0", "--precision", "fp32"]
        argv = flags_for(*more, *flags, folder=folder)
        main_train.main(argv)
        path = argv[argv.index("--output_dir") + 1]
        return json.loads(Path(path, "trainer_state.json").read_text()), path

    return run
