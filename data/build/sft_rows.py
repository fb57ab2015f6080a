"""Writes data/sft_data.jsonl and data/sft_eval_data.jsonl: questions on the small world, with one right answer each.

The held-back rows are of the same kinds and ask what no training row asks; the facts they need stand, in other
words, in the pretraining text.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from data.build import grammar
from data.build.identity import IDENTITY
from data.build.world import FACTS, Word

# name: (kind, training rows, held-back rows, answer, questions)
QUESTIONS: dict[str, tuple[str, int, int, str, list[str]]] = {
    "capital_en": (
        "fact",
        12,
        3,
        "The capital of {country} is {capital}.",
        ["What is the capital of {country}?", "Which city is the capital of {country}?"],
    ),
    "capital_zh": (
        "fact",
        11,
        3,
        "{zh_country}的首都是{zh_capital}。",
        ["{zh_country}的首都是哪里？", "哪个城市是{zh_country}的首都？"],
    ),
    "opposite_en": (
        "fact",
        10,
        2,
        "The opposite of {word} is {other}.",
        ["What is the opposite of {word}?", "Which word is the opposite of {word}?"],
    ),
    "opposite_zh": (
        "fact",
        10,
        2,
        "“{word}”的反义词是“{other}”。",
        ["“{word}”的反义词是什么？", "请说出“{word}”的反义词。"],
    ),
    "young_en": (
        "fact",
        7,
        2,
        "A young {animal} is {young:a}.",
        ["What is a young {animal}?", "What do we call a young {animal}?"],
    ),
    "colour_en": (
        "fact",
        7,
        2,
        "The colour of {thing} is {colour}.",
        ["What is the colour of {thing}?", "What colour is {thing}?"],
    ),
    "colour_zh": ("fact", 7, 2, "{thing}是{colour}的。", ["{thing}是什么颜色的？", "{thing}的颜色是什么？"]),
    "plural_en": (
        "fact",
        8,
        2,
        "The plural of {one} is {many}.",
        ["What is the plural of {one}?", "Write down the plural of {one}."],
    ),
    "tool_en": ("fact", 7, 2, "We use {tool} to {purpose}.", ["What do we use to {purpose}?"]),
    "job_en": ("fact", 7, 2, "{person:A} works {place}.", ["Where does {person:a} work?"]),
    "home_en": ("fact", 6, 1, "{animal:A} lives in a {home}.", ["Where does {animal:a} live?"]),
    "measure_zh": ("fact", 9, 2, "“{noun}”的量词是“{measure}”。", ["“{noun}”的量词是什么？", "“{noun}”用什么量词？"]),
    "day_en": ("fact", 5, 1, "The day after {now} is {next}.", ["What day comes after {now}?"]),
    "month_en": ("fact", 7, 2, "The month after {now} is {next}.", ["What month comes after {now}?"]),
    "day_zh": ("fact", 5, 1, "{now}的后面是{next}。", ["{now}的后面是星期几？"]),
    "word_en": (
        "translation",
        11,
        3,
        "The Chinese word for {en} is {zh}.",
        ["What is the Chinese word for {en}?", "How do you say {en} in Chinese?"],
    ),
    "word_zh": ("translation", 11, 3, "“{zh}”的英文是 {en}。", ["“{zh}”用英文怎么说？", "“{zh}”的英文是什么？"]),
    "number_en": (
        "number",
        10,
        2,
        "{n} in words is {name}.",
        ["Write {n} in words.", "How do you write {n} in words?"],
    ),
    "number_zh": ("number", 10, 2, "{n}写作{name}。", ["{n}用汉字怎么写？", "请用汉字写出{n}。"]),
    "add_en": ("arithmetic", 13, 3, "{a} + {b} = {c}.", ["What is {a} + {b}?", "Calculate {a} + {b}."]),
    "sub_en": ("arithmetic", 11, 3, "{a} - {b} = {c}.", ["What is {a} - {b}?", "Calculate {a} - {b}."]),
    "mul_en": ("arithmetic", 10, 2, "{a} * {b} = {c}.", ["What is {a} * {b}?", "Calculate {a} * {b}."]),
    "add_zh": ("arithmetic", 11, 2, "{a}加{b}等于{c}。", ["{a}加{b}等于多少？", "请计算{a}加{b}。"]),
    "sub_zh": ("arithmetic", 9, 2, "{a}减{b}等于{c}。", ["{a}减{b}等于多少？", "请计算{a}减{b}。"]),
    "mul_zh": ("arithmetic", 7, 2, "{a}乘{b}等于{c}。", ["{a}乘{b}等于多少？", "请计算{a}乘{b}。"]),
    "past": ("rewriting", 12, 3, "{past:C}.", ["Rewrite in the past tense: {plain:C}."]),
    "negative": ("rewriting", 10, 2, "{negative:C}.", ["Make this sentence negative: {plain:C}."]),
    "question": ("rewriting", 8, 2, "{question:C}", ["Turn this sentence into a question: {plain:C}."]),
    "polite": ("rewriting", 9, 2, "{polite:C}", ["Say this in a polite way: {order:C}."]),
    "she": ("rewriting", 8, 2, "{she:C}.", ["Change the subject to she: {plain:C}."]),
    "they": ("rewriting", 8, 2, "{they:C}.", ["Change the subject to they: {plain:C}."]),
    "reverse": ("rewriting", 9, 2, "{backwards}", ["Put these words in reverse order: {forwards}"]),
    "negative_zh": ("rewriting", 10, 2, "{negative}。", ["把这句话改成否定句：{plain}。"]),
    "question_zh": ("rewriting", 9, 2, "{question}", ["把这句话改成疑问句：{plain}。"]),
    "ba_zh": ("rewriting", 7, 2, "{ba}。", ["用“把”字改写这句话：{done}。"]),
    "he_zh": ("rewriting", 8, 2, "{he}。", ["把这句话的主语换成“他”：{plain}。"]),
}


def _items(name: str, rng: random.Random) -> list[dict[str, Word]]:
    """Returns what the rows of one name may ask about."""
    if name in FACTS:
        return list(FACTS[name])
    if name == "reverse":
        return grammar.word_lists(50, rng)
    if name == "polite":
        return grammar.orders_en(kept=True)
    clauses = grammar.clauses_zh(kept=True) if name.endswith("_zh") else grammar.clauses_en(kept=True)
    if name == "ba_zh":
        clauses = [clause for clause in clauses if clause["ba"]]
    if name in ("she", "they", "he_zh"):  # a sentence that would stay as it is asks for nothing
        same = {"she": ("she",), "they": ("they",), "he_zh": ("他",)}[name]
        clauses = [clause for clause in clauses if clause["who"] not in same]
    # "I" and "you" change places in a question of real life: leave them out, so that the answer is not disputed
    return [
        c for c in clauses if not (name.startswith("question") and c["who"] in ("I", "you", "we", "我", "你", "我们"))
    ]


def build_rows(seed: int = 0) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Returns (training rows, held-back rows), each row with ``instruction``, ``output`` and ``kind``."""
    rng, train, held = random.Random(seed), [], []
    for name, (kind, n_train, n_held, answer, questions) in QUESTIONS.items():
        items = _items(name, rng)
        rng.shuffle(items)
        for i, item in enumerate(items[: n_train + n_held]):
            question = questions[i % len(questions)].format(**item)
            row = {"instruction": question, "output": answer.format(**item), "kind": kind}
            (train if i < n_train else held).append(row)
    for answer, train_questions, held_questions in IDENTITY:
        train += [{"instruction": text, "output": answer, "kind": "identity"} for text in train_questions]
        held += [{"instruction": text, "output": answer, "kind": "identity"} for text in held_questions]
    rng.shuffle(train)
    rng.shuffle(held)
    return train, held


def write_rows(folder: Path, seed: int = 0) -> None:
    """Writes both files, one row a line, without the kind: the rows are in the usual two-field format."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in zip(("sft_data.jsonl", "sft_eval_data.jsonl"), build_rows(seed), strict=True):
        lines = [json.dumps({key: row[key] for key in ("instruction", "output")}, ensure_ascii=False) for row in rows]
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
