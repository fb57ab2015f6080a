"""Rows and models made of random numbers, so that a measurement needs nothing from outside."""

import json
import random
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.model_flops import config_of
from benchmarks.peers import ROOT, write_rows

TYPICAL_SHARE, SPREAD = 0.25, 0.6  # rows of max_len / 4 tokens on average; the log-normal's sigma


@dataclass
class Rows:
    """Sums over all rows, in tokens of the whole conversation: how many, with a label, and length²."""

    count: int
    tokens: int
    labelled: int
    squares: int


def load_tokenizer():
    """The embedded tokenizer with Qwen2.5's chat format; its tokens are the first ones of any vocabulary here."""
    from transformers import AutoTokenizer

    from utils.template import get_template

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data" / "tiny_model")
    tokenizer.chat_template = get_template("qwen2.5").to_jinja()
    tokenizer.eos_token = "<|im_end|>"
    return tokenizer


def make_model(shape: str, folder: Path, device: str, seed: int) -> None:
    """Saves a model of the shape with random bf16 weights, unless it is there."""
    import torch
    from transformers import AutoModelForCausalLM, set_seed

    if folder.is_dir():
        return
    tokenizer, part = load_tokenizer(), folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    set_seed(seed)
    config = config_of(
        shape, eos_token_id=tokenizer.eos_token_id, bos_token_id=None, pad_token_id=tokenizer.pad_token_id
    )
    with torch.device(device):  # seven billion random numbers take a CPU minutes
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    part.rename(folder)  # whole, or not there


def make_rows(folder: Path, count: int, max_len: int, seed: int) -> Rows:
    """Writes rows of random words for every program, log-normal in length and never longer than `max_len` tokens.

    A row's question takes a fifth of its words, its answer the rest.

    Returns:
        what the rows amount to, also kept in `rows.json` of the folder.
    """
    from utils.data.conversations import to_messages
    from utils.template import get_template

    tokenizer, template, chance = load_tokenizer(), get_template("qwen2.5"), random.Random(seed)
    pieces = sorted(piece[1:] for piece in tokenizer.get_vocab() if piece.startswith("Ġ"))
    words = [piece for piece in pieces if piece.isascii() and piece.isalpha() and len(piece) > 2]

    def row(length: int) -> dict:
        drawn = chance.choices(words, k=max(length, 2))
        cut = max(1, len(drawn) // 5)
        return {"instruction": " ".join(drawn[:cut]), "output": " ".join(drawn[cut:])}

    def encoded(row: dict) -> dict:
        return template.encode(to_messages(row), tokenizer)

    around = len(encoded(row(2))["input_ids"]) - 2
    middle = TYPICAL_SHARE * max_len
    rows, sums = [], Rows(count, 0, 0, 0)
    while len(rows) < count:
        # mean of a log-normal: median · exp(sigma² / 2)
        length = int(middle * chance.lognormvariate(-(SPREAD**2) / 2, SPREAD)) - around
        made = row(min(length, max_len - around))
        found = encoded(made)
        if len(found["input_ids"]) > max_len:
            continue  # two words may join into more tokens than they had
        rows.append(made)
        sums.tokens += len(found["input_ids"])
        sums.labelled += sum(label != -100 for label in found["labels"])
        sums.squares += len(found["input_ids"]) ** 2
    write_rows(folder, rows)
    (folder / "rows.json").write_text(json.dumps(asdict(sums)), encoding="utf-8")
    return sums


if __name__ == "__main__":
    shape, folder, device, seed = sys.argv[1:]
    make_model(shape, Path(folder), device, int(seed))
