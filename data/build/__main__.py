"""Makes every file of data/ again: ``python -m data.build`` from the repository root."""

from __future__ import annotations

import argparse
from pathlib import Path

from data.build.choice_rows import write_choices
from data.build.dpo_rows import write_pairs
from data.build.model import ROOT, export, pretrain, write_random_model
from data.build.pretrain_text import write_text
from data.build.sft_rows import write_rows
from data.build.tokenizer import train_tokenizer

STEPS = ("rows", "text", "tokenizer", "model")
DOCUMENTS = 120_000  # 6.7 million tokens, each seen once
SAMPLE_DOCUMENTS = 1_000  # data/pretrain_data.jsonl: the default data of the pretrain recipe
SAMPLE_SEED = 1  # other documents than those the tiny model was made from
VOCAB_SIZE = 3584


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m data.build", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=STEPS, default=list(STEPS), help="the steps to run, in this order")
    parser.add_argument("--data_dir", type=Path, default=ROOT / "data", help="where the finished files go")
    parser.add_argument(
        "--work_dir",
        type=Path,
        default=ROOT / "output" / "tiny_model",
        help="where the text, the random model and the run stay",
    )
    parser.add_argument("--documents", type=int, default=DOCUMENTS, help="documents of pretraining text")
    parser.add_argument(
        "--seed", type=int, default=0, help="the same seed gives the same text and the same random model"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Runs the chosen steps."""
    args = parse_args(argv)
    work, data = args.work_dir.resolve(), args.data_dir.resolve()
    text, tokenizer = work / "text.jsonl", work / "tokenizer"
    if "rows" in args.only:
        write_rows(data)
        write_pairs(data)
        write_choices(data / "choices_data.jsonl")
        write_text(data / "pretrain_data.jsonl", SAMPLE_DOCUMENTS, SAMPLE_SEED)
        print(f"rows: written to {data}")
    if "text" in args.only:
        write_text(text, args.documents, args.seed)
        print(f"text: {args.documents:,} documents in {text}")
    if "tokenizer" in args.only:
        train_tokenizer(text, tokenizer, VOCAB_SIZE)
        print(f"tokenizer: written to {tokenizer}")
    if "model" in args.only:
        parameters = write_random_model(tokenizer, work / "random", args.seed)
        print(f"model: {parameters:,} parameters; pretraining takes 35 to 45 minutes on two CPU cores")
        pretrain(work / "random", text, work / "run", args.seed)
        size = export(work / "run", tokenizer, data / "tiny_model")
        print(f"model: {size / 1e6:.1f} MB in {data / 'tiny_model'}")


if __name__ == "__main__":
    main()
