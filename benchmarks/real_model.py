"""What tuning teaches a real model, SmolLM2-135M-Instruct, beside TRL's own script on the same rows.

    python -m benchmarks.real_model --rows alpaca.jsonl                      # all cases, an hour or two on one core
    python -m benchmarks.real_model --rows alpaca.jsonl --cases ours:lora    # one; the others' results are kept
    python -m benchmarks.real_model --table                                  # the table again, from the kept results

Some rows are drawn to train on and some are held back; --seed decides which. Every case trains the same rows with the
same batch, learning rate, schedule, adapter, chat template and seed, as a user would, each program with its defaults
otherwise. `benchmarks/real_score.py` then scores all in the same way, with neither program's code. Results are kept
after each case, and the same command goes on with those that are left. The held-back rows' answers are written to
--folder, not to the results.
"""

import argparse
import json
import os
import random
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.compare import run
from benchmarks.peers import LINEAR, ROOT, Program, Work, write_rows
from benchmarks.tables import write_table
from utils.runtime.errors import UserError, nearest, raise_if_any

MODEL = "smollm2"
RESULTS = ROOT / "benchmarks" / "results" / "real_model.json"
MARK = "results/real_model.json"
PAGES = ("docs/real_model.md", "docs/zh/real_model.md", "benchmarks/README.md")
PROGRAMS = {"ours": "LLM-Dojo", "trl": "TRL"}
RATES = {"lora": 5e-4, "full": 5e-5, "qlora": 5e-4, "dora": 5e-4}
CASES = tuple(f"{program}:{mode}" for mode in RATES for program in PROGRAMS)
MAX_LEN = 256  # tokens; TRL pads each batch to its longest row
NAMES = {"lora": "LoRA", "qlora": "QLoRA", "dora": "DoRA", "full": "full"}
SHOWN = 200  # characters of an answer in the table
# the words of the tables, for docs/zh
CHINESE = {
    "| trained | by | loss |": "| 训练方式 | 程序 | 损失 |",
    "tokens an answer": "每个回答的 token 数",
    "ended, of ": "自行结束的回答，共 ",
    "sums right, of ": "加法答对，共 ",
    "capitals right, of ": "首都答对，共 ",
    "time and memory of the training": "训练的时间和内存",
    "| not trained |": "| 未训练 |",
    "not measured": "未测量",
    "| full |": "| 全量 |",
    "| question | before | after LoRA |": "| 问题 | 训练前 | LoRA 之后 |",
}
DEPENDS_ON = ("rows", "settings", "versions", "hardware")  # results of other ones are not mixed


@dataclass
class Tuning(Program):
    """A program that trains in one mode; `name` is LLM-Dojo or TRL."""

    mode: str = "lora"
    epochs: float = 1

    def command(self, work: Work, out: Path) -> list[str]:
        common = [
            "--model_name_or_path", str(work.base), "--num_train_epochs", str(self.epochs),
            "--learning_rate", str(RATES[self.mode]), "--lr_scheduler_type", "cosine", "--warmup_steps", "0.03",
            "--weight_decay", "0", "--max_grad_norm", "1", "--per_device_train_batch_size", str(work.rows_a_step),
            "--seed", str(work.seed), "--logging_steps", "5", "--save_strategy", "no", "--report_to", "none",
            "--use_cpu", "true", "--output_dir", str(out),
        ]  # fmt: skip
        own = self._ours(work, out) if self.name == PROGRAMS["ours"] else self._trl(work)
        return [str(self.python), *own, *common]

    def _ours(self, work: Work, out: Path) -> list[str]:
        words = [
            "main_train.py", "--train_data_path", str(work.data / "rows.jsonl"), "--template_name", "auto",
            "--train_on", "last_turn", "--max_len", str(work.max_len), "--precision", "bf16", "--card_samples", "0",
            "--cache_dir", str(out.parent / "cache"), "--overwrite_output_dir", "true",
        ]  # fmt: skip
        if self.mode == "full":
            return [*words, "--train_mode", "full"]
        words += ["--lora_rank", "16", "--lora_alpha", "32", "--lora_dropout", "0", "--train_special_tokens", "off"]
        return [*words, "--train_mode", "qlora" if self.mode == "qlora" else "lora",
                "--use_dora", str(self.mode == "dora").lower()]  # fmt: skip

    def _trl(self, work: Work) -> list[str]:
        words = ["-m", "trl.scripts.sft", "--dataset_name", str(work.data / "trl"), "--bf16", "true",
                 "--max_length", str(work.max_len)]  # fmt: skip
        if self.mode == "full":
            return [*words, "--dtype", "float32"]
        words += ["--dtype", "bfloat16", "--use_peft", "--lora_r", "16", "--lora_alpha", "32", "--lora_dropout", "0",
                  "--lora_target_modules", *LINEAR, "--use_dora", str(self.mode == "dora").lower()]  # fmt: skip
        quantised = ["--load_in_4bit", "true", "--bnb_4bit_quant_type", "nf4", "--use_bnb_nested_quant", "true"]
        return [*words, *quantised] if self.mode == "qlora" else words


def choose(file: Path, tokenizer, training: int, held_back: int, seed: int) -> tuple[dict, list[dict], list[list]]:
    """Draws rows that have an answer and fit into MAX_LEN tokens.

    Returns:
        what to write of them (file, sha256, line numbers); the rows to train on; the messages of those held back.

    Raises:
        UserError: there are too few.
    """
    from benchmarks.real_score import encode
    from utils.data.conversations import to_messages
    from utils.data.files import read_rows
    from utils.storage.files import sha256_of

    rows = []
    for row in read_rows(str(file)):
        try:
            messages = [{name: message[name] for name in ("role", "content")} for message in to_messages(row.value)]
        except (ValueError, TypeError, KeyError):
            continue
        if messages[-1]["role"] == "assistant" and messages[-1]["content"].strip():
            rows.append((row.line, row.value, messages))
    found = []
    for line, value, messages in random.Random(seed).sample(rows, len(rows)):
        encoded = encode(tokenizer, messages)
        if len(encoded.prompt) + len(encoded.answer) <= MAX_LEN:
            found.append((line, value, messages))
        if len(found) == training + held_back:
            break
    else:
        raise UserError(f"--rows {str(file)!r} has {len(found)} rows with an answer of text that fit into {MAX_LEN} "
                        f"tokens; {training + held_back} are needed, see --training and --held_back")  # fmt: skip
    first, rest = sorted(found[:training], key=lambda row: row[0]), sorted(found[training:], key=lambda row: row[0])
    about = {"file": file.name, "sha256": sha256_of(str(file)), "training": [row[0] for row in first],
             "held_back": [row[0] for row in rest]}  # fmt: skip
    return about, [row[1] for row in first], [row[2] for row in rest]


def measure(args) -> dict:
    """Runs the cases that are left; returns the results, which are written after each.

    Raises:
        UserError: the rows are too few, or earlier results have other conditions.
    """
    from transformers import AutoTokenizer

    from benchmarks.real_score import encode, score
    from utils.model.source import make_folder
    from utils.runtime.environment import hardware, versions

    base = Path(make_folder(args.model)).absolute()
    tokenizer = AutoTokenizer.from_pretrained(base)
    about, training, held_back = choose(args.rows, tokenizer, args.training, args.held_back, args.seed)
    work = Work(base, args.folder / "rows", args.batch, max_len=MAX_LEN, seed=args.seed)
    write_rows(work.data, training, ())
    settings = {"model": args.model, "epochs": args.epochs, "batch": args.batch, "seed": args.seed, "rates": RATES,
                "lora": {"rank": 16, "alpha": 32}, "max_len": MAX_LEN, "threads": args.threads}  # fmt: skip
    now = {"rows": about, "settings": settings, "versions": versions(), "hardware": hardware()}
    kept = _kept(args, now)
    lengths = [len(encode(tokenizer, messages).answer) for messages in held_back]
    kept["reference_tokens"] = round(sum(lengths) / len(lengths), 1)
    _write(args.output, kept)
    if "base" not in kept:
        _say("base: scoring")
        kept["base"] = score(base, base, held_back, _report(args.folder, "base"))
        _write(args.output, kept)
    done = {case_of(one) for one in kept["runs"] if "error" not in one}
    for number, case in enumerate(args.cases, 1):
        if case in done:
            continue
        _say(f"{case} ({number} of {len(args.cases)}): training on {len(training)} rows")
        one = _train(case, work, args)
        if "error" not in one:
            _say(f"{case}: {one['whole']:.0f} s, {one['peak'] / 1e9:.2f} GB; scoring on {len(held_back)} rows")
            out = args.folder / case.replace(":", "-") / "out" / "run"
            one |= score(out, base, held_back, _report(args.folder, case))
        if args.output.exists():
            kept = json.loads(args.output.read_text(encoding="utf-8"))  # another process may measure other cases
        kept["runs"] = [other for other in kept["runs"] if case_of(other) != case] + [one]
        _write(args.output, kept)
        _say(f"{case}: {one['error'] if 'error' in one else cells(one)}")
    return kept


def case_of(one: dict) -> str:
    """`ours:lora`"""
    return next(f"{short}:{one['mode']}" for short, name in PROGRAMS.items() if name == one["program"])


def _train(case: str, work: Work, args) -> dict:
    short, mode = case.split(":")
    scratch = args.folder / case.replace(":", "-")
    scratch.mkdir(parents=True, exist_ok=True)
    program = Tuning(PROGRAMS[short], Path(sys.executable), {"HF_HUB_OFFLINE": "1"}, mode, args.epochs)
    before = os.getloadavg()[0]
    found = run(program, work, scratch, args.threads)
    # other programs' work shows in the load: seconds of one case may then not be compared with those of another
    return {"program": program.name, "mode": mode, "load": [round(before, 2), round(os.getloadavg()[0], 2)], **found}


def _report(folder: Path, case: str) -> Path:
    return folder / f"answers-{case.replace(':', '-')}.jsonl"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _kept(args, now: dict) -> dict:
    if args.again or not args.output.exists():
        return now | {"runs": []}
    kept = json.loads(args.output.read_text(encoding="utf-8"))
    if other := [name for name in DEPENDS_ON if kept[name] != now[name]]:
        raise UserError(f"{args.output} holds results with other {' and '.join(other)}; give another --output, or "
                        "--again true to replace them")  # fmt: skip
    return kept


def _write(output: Path, kept: dict) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    part = output.with_name(f"{output.name}.part")
    part.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(output)


def cells(one: dict) -> str:
    """The figures of one model as cells of the table."""
    seconds = f"{one['training']:.0f} s, {one['peak'] / 1e9:.1f} GB" if "peak" in one else ""
    return " | ".join([f"{one['loss']:.3f}", f"{one['rouge_l']:.1f}", f"{one['answer_tokens']:.0f}",
                       str(one["ended"]), str(one["sums"]), str(one["capitals"]), seconds])  # fmt: skip


def table(results: dict) -> str:
    """The figures of all models as a Markdown table."""
    from benchmarks.real_score import ANSWER_TOKENS, CAPITALS, sums

    held_back, runs = len(results["rows"]["held_back"]), {case_of(one): one for one in results["runs"]}
    lines = [
        f"| trained | by | loss | ROUGE-L | tokens an answer | ended, of {held_back} | sums right, of {len(sums())} | "
        f"capitals right, of {len(CAPITALS)} | time and memory of the training |",
        f"|{'---|' * 9}",
        f"| not trained | | {cells(results['base'])} |",
    ]
    for case in CASES:
        short, mode = case.split(":")
        one = runs.get(case, {"error": "not measured"})
        shown = f"{'failed' if case in runs else 'not measured'} |{' |' * 5}" if "error" in one else cells(one)
        lines.append(f"| {NAMES[mode]} | {PROGRAMS[short]} | {shown} |")
    return "\n".join([*lines, "", _conditions(results, ANSWER_TOKENS)])


def answers_table(results: dict) -> str:
    """The answers to `QUESTIONS` before and after LoRA by this project; long ones are shortened."""
    after = next(one["answers"] for one in results["runs"] if case_of(one) == "ours:lora" and "error" not in one)
    lines = ["| question | before | after LoRA |", "|---|---|---|"]
    for question, before in results["base"]["answers"].items():
        lines.append(f"| {' | '.join(map(_cell, (question, before, after[question])))} |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    """A text in one line, at most 200 characters, for a Markdown table."""
    text = " / ".join(line for line in text.splitlines() if line.strip()).replace("|", "\\|")
    return text if len(text) <= SHOWN else f"{text[:SHOWN].rstrip()} …"


def in_chinese(text: str) -> str:
    """A table with the words of `CHINESE`."""
    for words, chinese in CHINESE.items():
        text = text.replace(words, chinese)
    return text


def _conditions(results: dict, limit: int) -> str:
    settings, loads = results["settings"], [load for one in results["runs"] for load in one["load"]]
    cpu, reference = results["hardware"]["cpu"], results["reference_tokens"]
    versions = ", ".join(f"{name} {results['versions'][name]}" for name in ("torch", "transformers", "trl", "peft"))
    loaded = f" of a machine with other work (load {min(loads):.1f} to {max(loads):.1f})" if loads else ""
    rates = ", ".join(f"{NAMES[mode]} {rate:g}" for mode, rate in settings["rates"].items())
    return (
        f"{len(results['rows']['training'])} rows of `{results['rows']['file']}`, epochs: {settings['epochs']:g}, "
        f"{settings['batch']} rows a step, seed {settings['seed']}; learning rates: {rates}. Answers of at most "
        f"{limit} tokens; those in the rows have {reference} on average. {cpu}, {settings['threads']} thread"
        f"{loaded}; {versions}."
    )


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the flags.

    Raises:
        UserError: with every problem found.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real_model", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--rows", type=Path, help="SFT rows in one file, in any form that is trained on")
    parser.add_argument("--cases", nargs="+", default=list(CASES), help=f"some of {' '.join(CASES)}; default: all")
    parser.add_argument("--model", default=MODEL, help="the base, with a chat template; default: %(default)s")
    parser.add_argument("--training", type=int, default=400, help="rows to train on; default: %(default)s")
    parser.add_argument("--held_back", type=int, default=50, help="rows to score on; default: %(default)s")
    parser.add_argument("--epochs", type=float, default=1, help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=8, help="rows of a step; default: %(default)s")
    parser.add_argument("--seed", type=int, default=42, help="of the rows and of the training; default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="of the training; default: %(default)s")
    parser.add_argument("--folder", type=Path, default=ROOT / "output" / "real_model", help="rows, runs and answers")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the results; default: %(default)s")
    parser.add_argument("--again", action="store_true", help="replace the results in --output")
    parser.add_argument("--table", action="store_true", help="only write the table from the kept results")
    args = parser.parse_args(argv)
    args.folder = args.folder.absolute()  # the runs have a working folder of their own
    raise_if_any(_problems(args))
    return args


def _problems(args: argparse.Namespace) -> list[str]:
    problems = [
        f"--{name} {getattr(args, name)} is not allowed; give a number above 0"
        for name in ("training", "held_back", "epochs", "batch", "threads")
        if not getattr(args, name) > 0
    ]
    for case in args.cases:
        if case not in CASES:
            problems.append(f"--cases {case!r} is none.{nearest(case, CASES)} Allowed: {', '.join(CASES)}")
    if args.table:
        return problems if args.output.is_file() else [*problems, f"--output {str(args.output)!r} is no file"]
    if args.rows is None:
        problems.append("--rows is missing; give a file of SFT rows")
    elif not args.rows.is_file():
        problems.append(f"--rows {str(args.rows)!r} is no file; give a file of SFT rows")
    if args.output.is_dir():
        problems.append(f"--output {str(args.output)!r} is a folder; give a file")
    return problems


def write_tables(results: dict) -> None:
    """Writes both tables where their marks are."""
    for page in PAGES:
        translate = in_chinese if "zh" in Path(page).parts else str
        write_table(ROOT / page, MARK, translate(table(results)))
        write_table(ROOT / page, f"{MARK}, answers", translate(answers_table(results)))


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    results = json.loads(args.output.read_text(encoding="utf-8")) if args.table else measure(args)
    print(table(results))
    if args.output == RESULTS:
        write_tables(results)
    if failed := [case_of(one) for one in results["runs"] if "error" in one]:
        _say(f"{', '.join(failed)} failed; the output is above and in {args.output}")
        sys.exit(1)


if __name__ == "__main__":
    try:  # not by run_command, which would limit the kernels that TRL keeps as well
        main()
    except UserError as error:
        _say(str(error))
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
