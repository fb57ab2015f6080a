"""Preparing rows (read, check, render, tokenise, write) beside the tokenizer alone on the same texts.

    python -m benchmarks.preparing --data rows.jsonl --model Qwen/Qwen2.5-0.5B-Instruct --rows 20000

All cases are measured in turn within each repeat, on as many processes, and ratios are taken within the repeat: by the
clock, and by the time of the processors, which other programs on the machine hardly change. Writes
`results/preparing.json` and the table in `README.md`.
"""

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

from benchmarks.tables import write_table
from utils.args import parse_args
from utils.data.conversations import to_messages
from utils.data.files import read_rows
from utils.runtime.environment import hardware, versions

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "preparing.json"
BATCH = 1000  # texts in one call of the tokenizer, as many as rows in a chunk
GOALS = (  # name, case, the case it is measured by, the least share of that one's speed
    ("a registered format : the tokenizer alone", "registered", "tokenizer", 0.9),
    ("`auto` : a registered format", "auto", "registered", 0.8),
)


def tokenize_alone(texts: list[str], tokenizer, processes: int) -> None:
    """Tokenises the texts, as parts of equal size in several processes, and drops the result."""

    def work(part: list[str]) -> None:
        for start in range(0, len(part), BATCH):
            tokenizer.backend_tokenizer.encode_batch(part[start : start + BATCH], add_special_tokens=False)

    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=work, args=(texts[i::processes],)) for i in range(processes)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def measured(run: Callable[[], None]) -> dict[str, float]:
    """Seconds by the clock, and of the processors, that `run` takes with the processes it starts."""

    def used() -> float:
        both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(usage.ru_utime + usage.ru_stime for usage in both)

    before, start = used(), time.perf_counter()
    run()
    return {"seconds": time.perf_counter() - start, "processor": used() - before}


def ratios(repeats: list[dict], case: str, by: str, clock: str) -> list[float]:
    """The speed of a case by that of another in each repeat.

    Args:
        repeats: case → what `measured` returned, of each repeat.
        case, by: the two cases.
        clock: `seconds` or `processor`.
    """
    return [repeat[by][clock] / repeat[case][clock] for repeat in repeats]


def table(results: dict) -> str:
    """The results as a Markdown table: the median of the repeats, and their range."""
    lines = ["| ratio of speeds | goal | by the clock | by the processors' time |", "|---|---|---|---|"]
    for name, case, by, goal in GOALS:
        cells = []
        for clock in ("seconds", "processor"):
            found = ratios(results["repeats"], case, by, clock)
            missed = ", goal missed" if statistics.median(found) < goal else ""
            cells.append(f"{statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f}){missed}")
        lines.append(f"| {name} | at least {goal} | {cells[0]} | {cells[1]} |")
    shown = (
        f"{results['rows']:,} rows of {results['tokens'] / results['rows']:.0f} tokens on average, "
        f"{results['processes']} processes, {len(results['repeats'])} repeats, load "
        f"{results['load']:.1f} at the end; `{results['format']}`."
    )
    return "\n".join([*lines, "", shown])


def measure(data: Path, model: str, name: str, rows: int, processes: int, repeats: int) -> dict:
    """Measures all cases in turn; returns what is written to `RESULTS`."""
    from utils.model.tokenizer import load_run_tokenizer
    from utils.template import get_run_template

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory() as folder:
        kept = [row for row in islice(read_rows(str(data)), rows) if row.value.get("output", "x").strip()]
        file = Path(folder) / "rows.jsonl"
        file.write_text("".join(json.dumps(row.value, ensure_ascii=False) + "\n" for row in kept), encoding="utf-8")

        def setting(form: str) -> tuple:
            flags = f"--model_name_or_path {model} --train_data_path {file} --template_name {form} --use_cpu true"
            more = f"--max_len 8192 --dataset_num_proc {processes} --output_dir {folder}/run"
            args, train_args = parse_args([*flags.split(), *more.split()], needs_weights=False)
            tokenizer = load_run_tokenizer(args)
            return args, train_args, get_run_template(args, tokenizer), tokenizer

        settings = {"registered": setting(name), "auto": setting("auto")}
        *_, template, tokenizer = settings["registered"]
        texts = [template.render(to_messages(row.value)) for row in kept]

        def prepare(case: str) -> None:
            with tempfile.TemporaryDirectory(dir=folder) as cache:
                args, *others = settings[case]
                args.cache_dir = cache
                args.task.load_datasets(args, *others)

        found = []
        for _ in range(repeats):
            repeat = {"tokenizer": measured(lambda: tokenize_alone(texts, tokenizer, processes))}
            found.append(repeat | {case: measured(lambda case=case: prepare(case)) for case in settings})
    tokens = sum(len(encoding.ids) for encoding in tokenizer.backend_tokenizer.encode_batch(texts))
    return {
        "hardware": hardware(), "versions": versions(), "format": name, "rows": len(kept), "tokens": tokens,
        "processes": processes, "load": os.getloadavg()[0], "repeats": found,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="SFT rows in one file.")
    parser.add_argument("--model", required=True, help="A model whose tokenizer has a chat template.")
    parser.add_argument("--format", default="qwen2.5", help="The registered format beside `auto`.")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    results = measure(given.data, given.model, given.format, given.rows, given.processes, given.repeats)
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    write_table(HERE / "README.md", f"results/{RESULTS.name}", table(results))
    print(table(results))


if __name__ == "__main__":
    main()
