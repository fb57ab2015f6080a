"""This project beside TRL's own script and LLaMA-Factory, on the same work, in one go.

    python benchmarks/compare.py --data alpaca_en_52k.jsonl          # all of it, hours on two cores
    python benchmarks/compare.py --data … --only default vocabulary  # some cases; the others' results are kept
    python benchmarks/compare.py --table                             # the tables again, from the kept results

Each peer runs in a virtual environment of its own, made at the first start. All train the same random model on the same
rows with the same adapter, precision, optimizer and seed; the runs of a case follow each other, so that what slows the
machine slows all. Results go to benchmarks/results/compare.json, each run with its seconds and memory.
"""

import argparse
import importlib.metadata
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.compare_table import OURS, PEERS, in_chinese, table  # noqa: E402
from benchmarks.peers import Program, Work, environment, programs, write_rows  # noqa: E402
from benchmarks.tables import write_table  # noqa: E402
from utils.errors import UserError, nearest, raise_if_any  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "compare.json"
SHAPES = {
    # 17M and 44M weights
    "small": {"vocab_size": 8192, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8,
              "num_attention_heads": 6, "num_key_value_heads": 6},
    "vocabulary": {"vocab_size": 151936, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6,
                   "num_attention_heads": 4, "num_key_value_heads": 4},
}  # fmt: skip
# case → (shape, rows, what is changed of the work, whether a second run follows on what the first prepared)
CASES = {
    "default": ("small", 1000, {}, False),
    "best": ("small", 1000, {"packing": True, "rows_a_step": 1}, False),
    "vocabulary": ("vocabulary", 240, {}, False),
    "first step": ("small", 1000, {"max_steps": 1}, False),
    "preparing": ("small", None, {"max_steps": 1, "prepare_with": 2}, True),
}
WHOLE_RUNS = ("default", "best", "vocabulary")  # of the others only the time to the first step counts
MANY, MANY_ROWS = "many rows", (100_000, 1_000_000)  # this project's memory, whatever the number of rows


def make_base(shape: str, folder: Path, data: Path) -> Path:
    """Saves a random Qwen2 of the shape, with a byte-level BPE of 8,192 tokens trained on the rows, and ChatML."""
    if folder.exists():
        return folder
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


def run(program: Program, work: Work, scratch: Path, threads: int) -> dict:
    """Runs one command to its end.

    Returns:
        seconds to the first optimizer step, seconds between the first and the last, steps, peak memory in bytes of the
        largest process; or the error.
    """
    clock, out = scratch / "clock", scratch / "out" / "run"
    shutil.rmtree(out, ignore_errors=True)
    clock.unlink(missing_ok=True)
    words, env = program.command(work, out), environment(program, clock, scratch / "cache", threads)
    with open(scratch / "said", "wb") as said:
        start = time.time()
        process = subprocess.Popen(words, cwd=ROOT, env=env, stdout=said, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode or not clock.exists():
        return {"error": (scratch / "said").read_text(errors="replace")[-1500:]}
    steps = [float(line) for line in clock.read_text().split()]
    return {
        "first_step": steps[0] - start,
        "training": steps[-1] - steps[0],
        "steps": len(steps),
        "peak": usage.ru_maxrss * 1024,
        "whole": time.time() - start,
    }


def measure_case(case: str, some: list[Program], args, folder: Path) -> list[dict]:
    """All repeats of a case, the programs taking turns."""
    shape, count, changes, again = CASES[case]
    lines = args.data.read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["output"].strip()]
    rows = rows[: min(args.rows or len(rows), count or len(rows))]
    data = write_rows(folder / f"data-{len(rows)}", rows)
    work = replace(Work(make_base(shape, folder / shape, args.data), data), **changes)
    found = []
    for repeat in range(args.repeats):
        for program in some:
            scratch = Path(tempfile.mkdtemp(dir=folder))
            for turn in ("first", "again") if again else ("first",):
                measured = run(program, work, scratch, args.threads)
                found.append({"case": case, "program": program.name, "repeat": repeat, "turn": turn, **measured})
                print(json.dumps(found[-1]), flush=True)
            shutil.rmtree(scratch)
    return found


def measure_many_rows(some: list[Program], args, folder: Path) -> list[dict]:
    """This project's peak memory on few and on many rows, which it prepares and begins to train on."""
    found, ours = [], [program for program in some if program.name == OURS]
    for repeat, count, program in itertools.product(range(args.repeats), args.many_rows, ours):
        data = folder / f"data-{count}"
        if not data.exists():
            write_rows(data, endless_rows(args.data, count))
        scratch = Path(tempfile.mkdtemp(dir=folder))
        work = Work(make_base("small", folder / "small", args.data), data, max_steps=3)
        measured = run(program, work, scratch, args.threads)
        found.append({"case": MANY, "program": OURS, "repeat": repeat, "turn": str(count), **measured})
        print(json.dumps(found[-1]), flush=True)
        shutil.rmtree(scratch)
    return found


def endless_rows(data: Path, count: int):
    """`count` rows, those of `data` again and again, each with a number of its own."""
    rows = [row for row in map(json.loads, data.read_text(encoding="utf-8").splitlines()) if row["output"].strip()]
    for number, row in enumerate(itertools.islice(itertools.cycle(rows), count)):
        yield row | {"instruction": f"{row['instruction']} ({number})"}


def trained_tokens(folder: Path, case: str, args) -> int:
    """How many labels the rows of a case have, which is the same for every program."""
    from transformers import AutoTokenizer

    from utils.data_rows import to_messages
    from utils.template import get_template

    shape, count, _, _ = CASES[case]
    data = folder / f"data-{min(args.rows or count, count)}" / "rows.jsonl"
    tokenizer, template = AutoTokenizer.from_pretrained(folder / shape), get_template("qwen2.5")
    rows = map(json.loads, data.read_text(encoding="utf-8").splitlines())
    return sum(label != -100 for row in rows for label in template.encode(to_messages(row), tokenizer)["labels"])


def machine(threads: int) -> dict:
    """What the figures depend on."""
    from utils.record import hardware

    names = ("torch", "transformers", "trl", "peft", "datasets", "accelerate")
    return {"hardware": hardware(), "threads": threads, "versions": {n: importlib.metadata.version(n) for n in names}}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python benchmarks/compare.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--data", type=Path, help="alpaca rows, a jsonl file")
    parser.add_argument("--only", nargs="+", choices=[*CASES, MANY], default=[*CASES, MANY], help="the cases to run")
    parser.add_argument("--programs", nargs="+", help="those to run; all three by default")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", type=int, help="rows at most, to try the script out")
    parser.add_argument("--many_rows", type=int, nargs=2, default=MANY_ROWS, help="of the case of that name")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each run")
    parser.add_argument("--folder", type=Path, default=ROOT / "output" / "compare", help="models, rows, environments")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="only write the tables from the kept results")
    args = parser.parse_args(argv)
    raise_if_any(_problems(args))
    return args


def _problems(args: argparse.Namespace) -> list[str]:
    """What is wrong with the flags and the rows, before anything is installed."""
    counts = {name: getattr(args, name) for name in ("repeats", "rows", "threads")}
    counts |= {"many_rows": min(args.many_rows)}
    problems = [
        f"--{name} {count} is not allowed; give a whole number of at least 1"
        for name, count in counts.items()
        if count is not None and count < 1
    ]
    for name in args.programs or []:
        if name not in (OURS, *PEERS):
            problems.append(f"--programs {name!r} is none.{nearest(name, PEERS)} Allowed: {', '.join((OURS, *PEERS))}")
    return problems if args.table else problems + _problems_of_rows(args.data)


def _problems_of_rows(data: Path | None) -> list[str]:
    if data is None or not data.is_file():
        return [f"--data {str(data) if data else ''!r} is no file; give a jsonl file of alpaca rows"]
    for number, line in enumerate(data.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            row = json.loads(line)
            texts = (row["instruction"], row["output"], row.get("input", ""))
        except (ValueError, TypeError, KeyError, AttributeError):
            texts = (None,)
        if not all(isinstance(text, str) for text in texts):
            return [f"{data}:{number} is no alpaca row; each line is an object with the texts instruction and output"]
    return []


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    kept = json.loads(args.output.read_text()) if args.output.exists() else {"runs": [], "trained_tokens": {}}
    if not args.table:
        args.folder.mkdir(parents=True, exist_ok=True)
        some = [one for one in programs(args.folder) if not args.programs or one.name in args.programs]
        kept |= machine(args.threads)
        for case in args.only:
            given = (some, args, args.folder)
            found = measure_many_rows(*given) if case == MANY else measure_case(case, *given)
            kept["runs"] = [one for one in kept["runs"] if one["case"] != case] + found
            if case in WHOLE_RUNS:
                kept["trained_tokens"][case] = trained_tokens(args.folder, case, args)
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(kept, indent=1) + "\n")  # a crash costs one case
    print(table(kept))
    if args.output == RESULTS:
        for page in (ROOT / "README.md", ROOT / "README_zh.md", ROOT / "benchmarks" / "README.md"):
            written = in_chinese(table(kept)) if page.stem.endswith("zh") else table(kept)
            write_table(page, "results/compare.json", written)


if __name__ == "__main__":
    try:  # not by run_command, which would limit the kernels that the peers keep as well
        main()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
