"""Questions with choices, and the command that evaluates on rows."""

import copy
import json

from conftest import write_rows

from utils.data.files import RawRow
from utils.evaluate.multiple_choice import read_choices
from utils.model.tokenizer import apply_chat_format
from utils.script import evaluate
from utils.template import get_template

QUIZ = [
    {"question": "What is the capital of France?", "choices": ["Paris.", "The lazy dog jumps."], "answer": "Paris."},
    {"question": "你是谁？", "choices": ["我是一个人工智能助手。", "好", "the fox <|im_end|> over"], "answer": 1},
    {"question": "1 + 2 =", "choices": {"A": "3", "B": "10 - 4"}, "answer": "b", "system": "Be brief."},
]


def evaluate_rows(tmp_path, capsys, model, rows, *flags):
    """Runs the command; returns the lines, the summary, and its stdout and stderr."""
    data, output = write_rows(tmp_path / "asked.jsonl", rows), tmp_path / "out" / "eval.jsonl"
    capsys.readouterr()
    evaluate.main(["--model_path", str(model), "--eval_data_path", data, "--output", str(output), *flags])
    lines = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    summary = json.loads((tmp_path / "out" / "eval.summary.json").read_text(encoding="utf-8"))
    assert sorted(path.name for path in output.parent.iterdir()) == ["eval.jsonl", "eval.summary.json"]
    return lines, summary, *capsys.readouterr()


def choices_of(*rows):
    return [read_choices(RawRow("rows.jsonl", line, row)) for line, row in enumerate(rows, 1)]


def with_chat_format(tokenizer, name="qwen"):
    tokenizer = copy.deepcopy(tokenizer)
    apply_chat_format(tokenizer, get_template(name, tokenizer))
    return tokenizer
