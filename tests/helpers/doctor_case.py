"""Runs for the doctor to examine: clean rows, and ways to spoil a row, a file, or a tokenizer."""

from types import SimpleNamespace

import tiny
from conftest import write_rows

CLEAN = [
    {"instruction": f"What is {first} plus {second}?", "output": f"{first} plus {second} is {first + second}."}
    for first in range(10)
    for second in range(4)
]
# of the two answers now one is the longer, now the other
CLEAN_PAIRS = [
    {
        "prompt": row["instruction"],
        "chosen": row["output"],
        "rejected": ("No. ", "I do not know that at all. ")[i % 2] * 3,
    }
    for i, row in enumerate(CLEAN)
]
CHINESE = [{"instruction": f"{number}的后面是几？", "output": f"后面是{number + 1}。"} for number in range(40)]
LONG = "the quick brown fox " * 60


class DoctorCase:
    """A run to look at: flags, rows and a model, each to be spoilt."""

    def __init__(self, folder, tiny_models, monkeypatch):
        self.folder, self.models, self.monkeypatch = folder, tiny_models, monkeypatch

    def write(self, rows, name="rows.jsonl"):
        return write_rows(self.folder / name, rows)

    def flags(self, *more, rows=CLEAN, model=None):
        return ["--model_name_or_path", model or self.models(), "--train_data_path", self.write(rows),
                "--output_dir", str(self.folder / "run"), "--cache_dir", str(self.folder / "cache"), *more]  # fmt: skip

    def pairs(self, rows):
        return ["--train_args_path", "train_args/dpo/base.py", *self.flags(rows=rows)]

    def model(self, change):
        """A tiny model whose tokenizer `change` has spoilt; returns its folder."""
        tokenizer = change()
        return tiny.save_tiny_model(self.folder / "model", tokenizer=tokenizer)


class WeightsReached(Exception):
    pass


def on_a_full_disk(case):
    case.monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10_000))
    return case.flags()


def tokenizer_with(**changes):
    import copy

    tokenizer = copy.deepcopy(tiny.byte_level_tokenizer())
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return tokenizer


def with_a_broken_line(case):
    flags = case.flags()
    with open(case.folder / "rows.jsonl", "a", encoding="utf-8") as file:
        file.write('{"instruction": "Hi", \n')
    return flags


def clean_and(**row):
    return [*CLEAN, {"instruction": "Say hello.", "output": "Hello.", **row}]
