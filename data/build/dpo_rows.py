"""Writes the preference pairs: data/dpo_single_data.jsonl, data/dpo_multi_data.jsonl and what is held back of each.

One wish runs through all of them: answer with one whole sentence, in the language of the question. What is not
wanted is a bare word, an excuse, a ramble, or, in a conversation, the last answer once more. They are mixed so that the
untrained model, to which a shorter answer is nearly always the likelier one, finds the wanted one likelier in half of
the pairs.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from data.build.sft_rows import QUESTIONS
from data.build.world import FACTS

# question of sft_rows → the bare answer
BARE = {
    "capital_en": "{capital}.", "capital_zh": "{zh_capital}。", "opposite_en": "{other:C}.", "opposite_zh": "{other}。",
    "young_en": "{young:A}.", "colour_en": "{colour:C}.", "colour_zh": "{colour}。", "plural_en": "{many:C}.",
    "tool_en": "{tool:C}.", "job_en": "{place:C}.", "home_en": "{home:A}.", "measure_zh": "{measure}。",
    "day_en": "{next}.", "month_en": "{next}.", "day_zh": "{next}。", "word_en": "{zh}.", "word_zh": "{en}.",
    "number_en": "{name:C}.", "number_zh": "{name}。",
}  # fmt: skip
EXCUSES = {"en": ["I do not know.", "No."], "zh": ["我不知道。", "不知道。"]}
RAMBLES = {
    "en": ["{answer} {answer}", "{answer} I think so, but I do not know.", "I do not know. {answer}"],
    "zh": ["{answer}{answer}", "{answer}我觉得是这样，可是我不知道。", "我不知道。{answer}"],
}
SYSTEM = {"en": "You are a helpful assistant.", "zh": "你是一个有用的助手。"}


def _questions(rng: random.Random) -> list[dict[str, str]]:
    """Every question there is, with its whole answer and its bare one."""
    found = []
    for name, bare in BARE.items():
        _, _, _, answer, questions = QUESTIONS[name]
        for item in FACTS[name]:
            found.append({
                "question": rng.choice(questions).format(**item), "answer": answer.format(**item),
                "bare": bare.format(**item), "language": "zh" if name.endswith("_zh") else "en",
            })  # fmt: skip
    rng.shuffle(found)
    return found


def _rejected(row: dict[str, str], number: int, rng: random.Random) -> str:
    """Of four, two are bare, one is an excuse and one a ramble."""
    if number % 4 == 2:
        return rng.choice(RAMBLES[row["language"]]).format(answer=row["answer"])
    return row["bare"] if number % 2 else rng.choice(EXCUSES[row["language"]])


def single_pairs(rows: list[dict[str, str]], rng: random.Random) -> list[dict]:
    """Questions and answers as plain texts."""
    return [
        {"prompt": row["question"], "chosen": row["answer"], "rejected": _rejected(row, number, rng)}
        for number, row in enumerate(rows)
    ]


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def multi_pairs(rows: list[dict[str, str]], rng: random.Random) -> list[dict]:
    """Conversations as lists of turns: one, two or three questions, every fourth with a system message."""
    pairs = []
    for number, row in enumerate(rows):
        earlier = [other for other in rng.sample(rows, 8) if other["language"] == row["language"] and other != row]
        earlier = earlier[: number % 3]
        prompt = [_turn("system", SYSTEM[row["language"]])] if number % 4 == 3 else []
        for other in earlier:
            prompt += [_turn("user", other["question"]), _turn("assistant", other["answer"])]
        prompt.append(_turn("user", row["question"]))
        rejected = _rejected(row, number // 3, rng)
        if earlier and number % 5 == 0:
            rejected = earlier[-1]["answer"]
        pairs.append({
            "prompt": prompt, "chosen": [_turn("assistant", row["answer"])],
            "rejected": [_turn("assistant", rejected)],
        })  # fmt: skip
    return pairs


def write_pairs(folder: Path, seed: int = 0, train: int = 160, held_back: int = 60) -> None:
    """Writes the four files; no question of a held-back pair is asked last in a training pair."""
    rng = random.Random(seed)
    rows = _questions(rng)
    for name, make in (("single", single_pairs), ("multi", multi_pairs)):
        rng.shuffle(rows)
        parts = {"data": rows[:train], "eval_data": rows[train : train + held_back]}
        for part, chosen in parts.items():
            lines = [json.dumps(pair, ensure_ascii=False) for pair in make(chosen, rng)]
            (folder / f"dpo_{name}_{part}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
