"""Counts how long the rows of a data set are in tokens, and keeps the counts, not the rows, in `lengths.json`.

python -m llm_tricks.packing.count_lengths --data F --model_name_or_path M --template_name qwen2 --name NAME

F is any file, folder or glob that `--train_data_path` takes (jsonl, json, csv, parquet; instructions, conversations or
preference pairs), M a folder or a hub's name with a tokenizer, NAME what the set is to be called; a set of that name is
replaced. The tokens are those the framework trains on: rendered by the template, tokenised as a whole. A pair is two
rows, the prompt with either answer, as in a step of `dpo_single`. Rows the framework would refuse or skip, an empty
answer say, are counted apart. `--source` and `--tokenizer_name` say in the file where the rows come from and what the
tokenizer is called; without them these are F's and M's last parts.

The four sets of `lengths.json` were counted so, with M a folder of Qwen/Qwen2.5-0.5B:

python -m llm_tricks.packing.count_lengths --data alpaca_data.json --name alpaca_en \\
    --source "Stanford Alpaca, alpaca_data.json, CC BY-NC 4.0" \\
    --model_name_or_path M --template_name qwen2 --tokenizer_name Qwen2.5
python -m llm_tricks.packing.count_lengths --data alpaca_zh_demo.json --name alpaca_zh \\
    --source "LLaMA-Factory, data/alpaca_zh_demo.json, Apache-2.0" \\
    --model_name_or_path M --template_name qwen2 --tokenizer_name Qwen2.5
python -m llm_tricks.packing.count_lengths --data dummy_conversation.json --name multiturn \\
    --source "FastChat, data/dummy_conversation.json (synthetic), 500 conversations, Apache-2.0" \\
    --model_name_or_path M --template_name qwen2 --tokenizer_name Qwen2.5
python -m llm_tricks.packing.count_lengths --data dpo_zh_demo.json --name dpo_zh \\
    --source "LLaMA-Factory, data/dpo_zh_demo.json, 300 preference pairs, Apache-2.0" \\
    --model_name_or_path M --template_name qwen2 --tokenizer_name Qwen2.5
"""

import argparse
import json
import os
from collections import Counter
from pathlib import Path

from utils.data.bad_rows import BadRow
from utils.data.conversations import to_messages
from utils.data.files import find_files, read_rows
from utils.data.pairs import to_pair
from utils.model.tokenizer import load_tokenizer
from utils.runtime.command import run_command
from utils.runtime.errors import UserError, load_failure, raise_if_any
from utils.template import get_template
from utils.template.messages import count_answers
from utils.template.tokenize import IGNORE_INDEX

LENGTHS = Path(__file__).with_name("lengths.json")
BATCH = 1000  # rows tokenised at once


def conversations(row, template) -> list[list[dict]]:
    """What a row brings to training: one conversation, two of a preference pair, none where it cannot be used."""
    try:
        if isinstance(row, dict) and {"chosen", "rejected", "reject"} & row.keys():
            pair = to_pair(row)
            found = [pair["prompt"] + pair[side] for side in ("chosen", "rejected")]
        else:
            found = [to_messages(row)]
        for messages in found:
            template.check(messages)
    except (BadRow, UserError):
        return []
    return found


def count(files: list[str], tokenizer, template) -> dict:
    """The rows of the files: how many, how many were left out, their tokens, and {length: rows}."""
    read = [[] if row.problem else conversations(row.value, template) for file in files for row in read_rows(file)]
    usable = [messages for found in read for messages in found]
    lengths, trained = Counter(), 0
    for start in range(0, len(usable), BATCH):
        for row in template.encode_batch(usable[start : start + BATCH], tokenizer):
            lengths[len(row["input_ids"])] += 1
            trained += sum(label != IGNORE_INDEX for label in row["labels"])
    return {
        "rows": len(usable),
        "rows_left_out": sum(not found for found in read),
        "tokens": sum(length * rows for length, rows in lengths.items()),
        "trained_tokens": trained,
        "answers": sum(map(count_answers, usable)),
        "histogram": dict(sorted(lengths.items())),
    }


def text_of(sets: dict) -> str:
    """The file: a line a field, each histogram on one."""
    named = []
    for name, found in sets.items():
        fields = ",\n".join(
            f"  {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in found.items()
        )
        named.append(f" {json.dumps(name)}: {{\n{fields}\n }}")
    return "{\n" + ",\n".join(named) + "\n}\n"


def sets_in(file: Path) -> tuple[dict, list[str]]:
    """What `--out` holds already, and why it cannot be read or written."""
    if not file.parent.is_dir():
        return {}, [f"--out {str(file)!r} lies in a folder that does not exist; make {str(file.parent)!r} first"]
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        return {}, [f"--out {str(file)!r} cannot be written; give a file you may write"]
    if not file.exists():
        return {}, []
    try:
        sets = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # a folder; not UTF-8, not JSON
        return {}, [f"--out {str(file)!r} cannot be read: {error}. Give another file, or remove this one"]
    if isinstance(sets, dict) and all(isinstance(found, dict) for found in sets.values()):
        return sets, []
    return {}, [f"--out {str(file)!r} holds no sets this command wrote. Give another file, or remove this one"]


def tokenizer_and_template(path: str, name: str) -> tuple:
    """Both, fitted to each other.

    Raises:
        UserError: one of them cannot be had.
    """
    try:
        tokenizer = load_tokenizer(path)
    except (OSError, ValueError) as error:  # the tokenizer is there, the model's configuration is not
        raise UserError(load_failure("configuration", "--model_name_or_path", path, error)) from error
    return tokenizer, get_template(name, tokenizer)


def main(argv: list[str] | None = None) -> None:
    """Counts one set and puts it into the file.

    Raises:
        UserError: all that is wrong with the flags, before anything is counted.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag in ("data", "model_name_or_path", "template_name", "name"):
        parser.add_argument(f"--{flag}", required=True)
    parser.add_argument("--source", help="where the rows come from, in words")
    parser.add_argument("--tokenizer_name", help="what the tokenizer is called")
    parser.add_argument("--out", type=Path, default=LENGTHS, help="default: lengths.json beside this script")
    args = parser.parse_args(argv)

    sets, problems = sets_in(args.out)
    files, missing = find_files(args.data, "--data")
    try:
        tokenizer, template = tokenizer_and_template(args.model_name_or_path, args.template_name)
    except UserError as error:
        missing += error.problems
    raise_if_any(problems + missing)
    sets[args.name] = {
        "source": args.source or Path(args.data).name,
        "tokenizer": args.tokenizer_name or Path(args.model_name_or_path).name,
        "vocabulary": len(tokenizer),
        "template": args.template_name,
        **count(files, tokenizer, template),
    }
    args.out.write_text(text_of(sets), encoding="utf-8")
    print({key: value for key, value in sets[args.name].items() if key != "histogram"})


if __name__ == "__main__":
    run_command(main)
