"""Writes the pretraining text: the facts and skills of the small world in plain words, and a form with chat tokens.

More than half of the documents are chats in which the assistant repeats or finishes a sentence. Without them the chat
tokens would keep their random embeddings, and LoRA, which freezes embeddings, could not tune around that.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from data.build import grammar
from data.build.sft_rows import build_rows
from data.build.wording import FACT_WORDING, GLUE, SKILL_WORDING
from data.build.world import FACTS, NOUNS

CHAT_SHARE = 0.6
# How often a sentence is about each kind, next to 1 for the others: what is hard to learn comes more often.
WEIGHTS = {"add_en": 3, "sub_en": 3, "mul_en": 2, "add_zh": 3, "sub_zh": 3, "mul_zh": 2, "word_en": 1.5, "word_zh": 1.5,
           "number_en": 1.5, "number_zh": 1.5, "capital_en": 1.5, "capital_zh": 1.5,
           "past": 2.5, "negative": 2.5, "question": 2.5,
           "reverse": 3, "negative_zh": 1.5, "question_zh": 1.5, "ba_zh": 1.5, "glue": 4, "day_en": 0.5, "day_zh": 0.5,
           "home_en": 0.5, "polite": 0.7, "list": 3}  # fmt: skip
SYSTEMS = [
    ("You are a helpful assistant", 6),
    ("You are a kind teacher", 1),
    ("You answer in one sentence", 1),
    ("你是一个有用的助手", 1),
]
REPEAT_EN = ["Repeat after me: {}", "Say it again: {}", "Read this aloud: {}", "Copy this: {}"]
REPEAT_ZH = ["跟我读：{}", "再说一遍：{}", "请重复：{}", "抄写：{}"]
FINISH_EN = ["Finish the sentence: {}", "Complete what I begin: {}", "Go on from here: {}"]
FINISH_ZH = ["把句子补全：{}", "接着说下去：{}", "请说完整：{}"]


class TextWriter:
    """Draws sentences and documents.

    Args:
        seed: the same seed gives the same text.
    """

    def __init__(self, seed: int = 0):
        self.rng = random.Random(seed)
        en, zh, orders = grammar.clauses_en(kept=False), grammar.clauses_zh(kept=False), grammar.orders_en(kept=False)
        skills = {name: zh if name.endswith("_zh") else orders if name == "polite" else en for name in SKILL_WORDING}
        skills["ba_zh"] = [clause for clause in zh if clause["ba"]]
        self.items = {**FACTS, **skills}
        self.wording = {**FACT_WORDING, **SKILL_WORDING}
        self.names = [*self.wording, "glue", "list"]
        self.weights = [WEIGHTS.get(name, 1) for name in self.names]
        # The rows of the fine-tuning files: no document may hold one of their questions or answers.
        self.taboo = {row[key].casefold() for rows in build_rows() for row in rows for key in ("instruction", "output")}

    def sentence(self, name: str | None = None) -> tuple[str, str, bool]:
        """Returns (the part before the cut, the part after it, whether it is Chinese)."""
        name = name or self.rng.choices(self.names, self.weights)[0]
        if name == "glue":
            line = self.rng.choice(GLUE)
            chinese = any("一" <= letter <= "鿿" for letter in line)
            at = self.rng.randrange(2, len(line) - 2) if chinese else line.index(" ", len(line) // 3)
            return line[:at], line[at:], chinese
        if name == "list":
            language, comma = self.rng.choice((("en", ", "), ("zh", "、")))
            words = [item[language] for item in self.rng.sample(NOUNS, self.rng.randint(2, 6))]
            return comma.join(words), "", language == "zh"  # with no end to guess: it is only good for repeating
        item = grammar.word_lists(1, self.rng)[0] if name == "reverse" else self.rng.choice(self.items[name])
        head, tail = self.rng.choice(self.wording[name]).split("|")
        return head.format(**item), tail.format(**item), name.endswith("_zh")

    def plain(self) -> str:
        """Returns one to five sentences, in half of the documents on one subject."""
        names = [None] * self.rng.randint(1, 5)
        if self.rng.random() < 0.5:
            names = self.rng.choices(self.names, self.weights) * len(names)
        parts = [self.sentence(name) for name in names]
        return "".join(head + tail + ("" if chinese else " ") for head, tail, chinese in parts).strip()

    def turn(self) -> tuple[str, str]:
        """Returns (what the user asks, what the assistant says): to repeat a sentence or to finish it."""
        head, tail, chinese = self.sentence()
        if not tail or self.rng.random() < 0.35:
            return self.rng.choice(REPEAT_ZH if chinese else REPEAT_EN).format(head + tail), head + tail
        return self.rng.choice(FINISH_ZH if chinese else FINISH_EN).format(head), head + tail

    def chat(self) -> str:
        """Returns one to three turns in the Qwen1.5 chat format."""
        system = self.rng.choices([text for text, _ in SYSTEMS], [weight for _, weight in SYSTEMS])[0]
        text = f"<|im_start|>system\n{system}<|im_end|>\n"
        for _ in range(self.rng.choice((1, 1, 1, 2, 3))):
            question, answer = self.turn()
            text += f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
        return text

    def document(self) -> str:
        """Returns one document that holds no question and no answer of the fine-tuning rows."""
        while True:
            text = self.chat() if self.rng.random() < CHAT_SHARE else self.plain()
            folded = text.casefold()
            if not any(phrase in folded for phrase in self.taboo):
                return text


def write_text(path: Path, documents: int, seed: int = 0) -> None:
    """Writes ``documents`` lines of ``{"text": ...}``."""
    writer = TextWriter(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(documents):
            file.write(json.dumps({"text": writer.document()}, ensure_ascii=False) + "\n")
