"""The embedded model: small, made by this project, ignorant of the rows before tuning and able after it."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.tiny_model import answer_rows

FOLDER = ROOT / "data" / "tiny_model"


def rows_of(name):
    return [json.loads(line) for line in (ROOT / "data" / name).read_text(encoding="utf-8").splitlines()]


TRAIN, HELD_BACK = rows_of("sft_data.jsonl"), rows_of("sft_eval_data.jsonl")


def test_size_and_shape():
    model = AutoModelForCausalLM.from_pretrained(FOLDER)
    assert model.config.model_type == "qwen2"
    assert model.num_parameters() <= 4_000_000
    assert sum(path.stat().st_size for path in FOLDER.rglob("*")) <= 10_000_000
    assert not list(FOLDER.glob("*.bin"))


def test_tokenizer_has_qwens_special_tokens_and_splits_digits():
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>"):
        assert len(tokenizer(token, add_special_tokens=False)["input_ids"]) == 1
    assert tokenizer.tokenize("1234") == list("1234")
    text = "Any text, 任何文字 😀\n\t!"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_sample_rows():
    assert len(TRAIN) >= 200
    assert all(set(row) == {"instruction", "output"} for row in TRAIN + HELD_BACK)
    asked = [row["instruction"] for row in TRAIN + HELD_BACK]
    assert len(set(asked)) == len(asked)
    chinese = sum(bool(re.search("[\u4e00-\u9fff]", row["instruction"])) for row in TRAIN)
    assert 0.2 < chinese / len(TRAIN) < 0.8


def test_pretraining_never_saw_the_rows(tmp_path):
    """No question of either file stands in the text the model is made from."""
    from data.build.pretrain_text import write_text

    write_text(tmp_path / "text.jsonl", 20_000, 0)
    text = (tmp_path / "text.jsonl").read_text(encoding="utf-8") + (ROOT / "data/pretrain_data.jsonl").read_text(
        "utf-8"
    )
    assert [
        row["instruction"]
        for row in TRAIN + HELD_BACK
        if json.dumps(row["instruction"], ensure_ascii=False)[1:-1] in text
    ] == []


def share_right(folder, rows):
    """The share of rows that are answered word for word, in plain transformers and PEFT."""
    torch.set_num_threads(2)
    answers = answer_rows(folder, rows)
    torch.set_num_threads(1)
    return sum(answer == row["output"] for answer, row in zip(answers, rows, strict=True)) / len(rows)


@pytest.mark.slow
def test_tuning_teaches(tmp_path):
    """`python main_train.py` as a user gives it, then the questions to the base and to the trained model."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    folder = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "main_train.py", "--output_dir", str(folder)],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert f"training rows    {len(TRAIN)}, dropped 0" in done.stderr
    assert share_right(FOLDER, TRAIN + HELD_BACK) == 0
    learned, generalised = share_right(folder, TRAIN), share_right(folder, HELD_BACK)
    print(f"word for word: {learned:.3f} of the training rows, {generalised:.3f} of the held-back rows")
    assert learned >= 0.8
    assert generalised >= 0.4
