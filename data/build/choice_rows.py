"""Writes data/choices_data.jsonl: multiple choice about the small world, on facts that no fine-tuning row tells.

The wrong choices are answers to the same question about other things, in the same words.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from data.build.sft_rows import QUESTIONS, build_rows
from data.build.world import FACTS

CHOICES = 4
KINDS = ("fact", "translation")  # one right answer, and others of the same table are wrong
LETTERS = "ABCD"


def build_choices(seed: int = 0) -> list[dict]:
    """Returns rows ``{"question", "choices", "answer"}``: the held-back facts, their answers among three wrong ones."""
    rng, rows = random.Random(seed), []
    held_back = {row["instruction"]: row["output"] for row in build_rows(seed)[1] if row["kind"] in KINDS}
    for name, (kind, _, _, answer, questions) in QUESTIONS.items():
        if kind not in KINDS:
            continue
        for item in FACTS[name]:
            for question in questions:
                right = held_back.get(question.format(**item))
                if right is None:
                    continue
                # the thing that is asked about stays, what is said of it comes from another item
                key = _said(answer)
                others = sorted({other[key] for other in FACTS[name]} - {item[key]})
                wrong = [answer.format(**{**item, key: other}) for other in rng.sample(others, CHOICES - 1)]
                choices = [right, *wrong]
                rng.shuffle(choices)
                rows.append(
                    {
                        "question": question.format(**item),
                        "choices": choices,
                        "answer": LETTERS[choices.index(right)],
                    }
                )
    rng.shuffle(rows)
    return rows


def _said(answer: str) -> str:
    """Returns the field that an answer tells, its last one: ``"The capital of {country} is {capital}."`` -> ``capital``"""
    told_first = {"We use {tool} to {purpose}.": "tool"}
    return told_first.get(answer) or answer.rpartition("{")[2].partition("}")[0].partition(":")[0]


def write_choices(path: Path, seed: int = 0) -> None:
    """Writes the file, one row a line."""
    lines = [json.dumps(row, ensure_ascii=False) for row in build_choices(seed)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
