"""Trains the tiny model's own tokenizer: byte-level BPE with Qwen2's splitting and special tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from data.build.grammar import SUBJECTS_ZH
from data.build.world import FACTS

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_HAN = re.compile("[一-鿿]+")
_SPECIAL = re.compile("|".join(re.escape(token) for token in SPECIAL_TOKENS))


def _chinese_words() -> set[str]:
    """Returns the Chinese words of the tables."""
    composed = ("number_zh", "day_zh")  # 二十七 and 星期三 are read sign by sign, so they stay in pieces
    tables = [items for name, items in FACTS.items() if name not in composed]
    words = {value for items in tables for item in items for value in item.values()}
    return {str(word) for word in words | set(SUBJECTS_ZH) if _HAN.fullmatch(word)}


def _pieces(texts: Iterable[str]) -> Iterator[str]:
    """Yields what the merges are learned from.

    Chinese has no spaces, so BPE on made-up text would merge whole phrases across words, and the same word would be
    written with other tokens in the next sentence. It sees the text without its Chinese, then Chinese word by word.
    """
    letters = set()
    for text in texts:
        letters.update(_HAN.findall(text))
        yield _HAN.sub("。", _SPECIAL.sub("\n", text))
    for letter in sorted(set("".join(letters))):
        yield from [letter] * 2000  # every character is a token before any longer word is
    for word in sorted(_chinese_words()):
        yield from [word] * 500


def train_tokenizer(text_file: Path, folder: Path, vocab_size: int) -> None:
    """Trains on the ``{"text": ...}`` lines of ``text_file`` and saves a Qwen2 tokenizer to ``folder``."""
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.trainers import BpeTrainer
    from transformers import Qwen2Tokenizer

    tokenizer = Qwen2Tokenizer()  # an empty one: its normaliser, splitting and decoder are what is wanted
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(ByteLevel.alphabet()),
        min_frequency=5,
        show_progress=False,
    )
    with text_file.open(encoding="utf-8") as file:
        tokenizer.backend_tokenizer.train_from_iterator(_pieces(json.loads(line)["text"] for line in file), trainer)
    trained = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    merges = [tuple(merge) for merge in trained["merges"]]
    final = Qwen2Tokenizer(
        vocab=trained["vocab"], merges=merges, extra_special_tokens=SPECIAL_TOKENS[1:], model_max_length=2048
    )
    final.save_pretrained(folder)
