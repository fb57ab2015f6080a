"""What the compared programs work on: random models, and the rows in each program's own form."""

import hashlib
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

from benchmarks.peers import Work

SHAPES = {
    # 17M and 44M weights
    "small": {"vocab_size": 8192, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8,
              "num_attention_heads": 6, "num_key_value_heads": 6},
    "vocabulary": {"vocab_size": 151936, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6,
                   "num_attention_heads": 4, "num_key_value_heads": 4},
}  # fmt: skip


def made_once(place: Path, make: Callable[[Path], object]) -> Path:
    """The folder `place`, made where it is not there yet; what is half made when the power goes is made anew."""
    if not place.exists():
        part = place.with_name(f"{place.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        make(part)
        part.rename(place)
    return place


def key_of(data: Path) -> str:
    """Eight characters that tell this file from others, and from what it was."""
    about = data.stat()
    return hashlib.sha256(f"{data.resolve()} {about.st_size} {about.st_mtime_ns}".encode()).hexdigest()[:8]


def answered_rows(data: Path) -> list[dict]:
    """The rows with an answer. Only a line feed ends a line: a text may hold what Python takes for others."""
    lines = data.read_text(encoding="utf-8").split("\n")
    return [row for row in (json.loads(line) for line in lines if line.strip()) if row["output"].strip()]


def endless_rows(data: Path, count: int):
    """`count` rows, those of `data` again and again, each with a number of its own."""
    for number, row in enumerate(itertools.islice(itertools.cycle(answered_rows(data)), count)):
        yield row | {"instruction": f"{row['instruction']} ({number})"}


def make_base(shape: str, folder: Path, data: Path) -> Path:
    """Saves a random Qwen2 of the shape, with a byte-level BPE of 8,192 tokens trained on the rows, and ChatML."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

    from utils.template import get_template

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=8192, special_tokens=special, initial_alphabet=alphabet)
    bpe.train_from_iterator(data.read_text(encoding="utf-8").splitlines(), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = get_template("qwen2.5").to_jinja()
    torch.manual_seed(0)
    config = Qwen2Config(
        **SHAPES[shape], max_position_embeddings=2048, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def trained_tokens(work: Work) -> int:
    """How many labels the rows have, which is the same for every program."""
    from transformers import AutoTokenizer

    from utils.data.conversations import to_messages
    from utils.template import get_template

    tokenizer, template = AutoTokenizer.from_pretrained(work.base), get_template("qwen2.5")
    conversations = [to_messages(row) for row in answered_rows(work.data / "rows.jsonl")]
    return sum(label != -100 for row in template.encode_batch(conversations, tokenizer) for label in row["labels"])
