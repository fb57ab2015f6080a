"""Streamed rows beside prepared ones: rows a second, memory over all rows, and the time to resume.

    python -m benchmarks.streaming                     # writes benchmarks/streaming.json
    python -m benchmarks.streaming --rows 20000 --many 50000 --out /tmp/streaming.json

Only the data is measured: rows from the files to the batches of a step, without a model. Each part is a process of its
own. Prepared rows are tokenised by as many processes as the stream has workers, and then read once. On a machine that
does other work as well, compare the rows per second of a processor.
"""

import argparse
import importlib.metadata
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BATCH = 16
# part → processes that tokenise beside the training's
PARTS = {"prepared": 2, "streamed by 2 workers": 2, "streamed by the training process": 0}
PARTS_OF_MANY = {"streamed by 2 workers": 2, "resumed at 90 %": 0}
WORDS = (
    "the",
    "a",
    "river",
    "sea",
    "house",
    "word",
    "number",
    "light",
    "never",
    "often",
    "green",
    "small",
    "and",
    "or",
)


def write_rows(path: Path, rows: int) -> None:
    """Writes conversations of some 40 to 110 tokens."""
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            text = [WORDS[(number * 7 + place * place) % len(WORDS)] for place in range(10 + number % 30)]
            question, answer = " ".join(text[: len(text) // 2]), " ".join(text[len(text) // 2 :])
            file.write(json.dumps({"instruction": f"{number}: {question}?", "output": f"{answer}."}) + "\n")


def memory() -> float:
    """What this process and its workers hold, in MB; pages that they share are divided among them."""
    import psutil

    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return sum(process.memory_full_info().pss for process in processes) / 1e6


def processor_time() -> float:
    """The time of processors that this process and its ended children have used, in seconds."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def load(folder: Path, workers: int, streaming: bool):
    """Loads the rows as main_train.py does; returns its arguments, tokenizer and Data."""
    from utils.args import parse_args
    from utils.model.tokenizer import load_run_tokenizer
    from utils.template import get_template

    flags = ["--train_data_path", str(folder / "rows.jsonl"), "--cache_dir", str(folder / "cache"), "--doctor", "off",
             "--output_dir", str(folder / "run"), "--streaming", str(streaming), "--dataset_num_proc",
             str(max(1, workers))]  # fmt: skip
    args, train_args = parse_args(flags)
    tokenizer = load_run_tokenizer(args)
    template = get_template(args.template_name, tokenizer)
    return args, train_args, tokenizer, args.task.load_datasets(args, train_args, template, tokenizer)


def run_part(part: str, folder: Path) -> dict:
    """Measures one part in this process."""
    import transformers  # noqa: F401  imports are not measured
    from torch.utils.data import BatchSampler, DataLoader, RandomSampler

    from utils.train.stream import StreamBatches, collate_stream, init_worker

    started, workers, before = time.perf_counter(), (PARTS | PARTS_OF_MANY)[part], processor_time()
    args, train_args, tokenizer, data = load(folder, workers, part != "prepared")
    loaded, rows = time.perf_counter(), data.rows_in_epoch()
    collate = args.task.build_collator(args, train_args, tokenizer)
    if data.stream is None:
        loader = DataLoader(
            data.train, batch_sampler=BatchSampler(RandomSampler(data.train), BATCH, False), collate_fn=collate
        )
    else:
        data.stream.empty = args.task.row_type.filler(data.train[0])
        batches = StreamBatches(data.stream.order, BATCH, 1, 0)
        if part.startswith("resumed"):
            batches.start_epoch(0, len(batches) * 9 // 10)
        loader = DataLoader(
            data.stream, batch_sampler=batches, num_workers=workers,
            collate_fn=lambda rows: collate_stream(collate, rows),
            worker_init_fn=lambda worker: init_worker(workers, 0, worker),
        )  # fmt: skip
        if part.startswith("resumed"):
            next(iter(DataLoader(data.stream, batch_sampler=list(batches)[-1:], collate_fn=loader.collate_fn)))
            return {"seconds to the index": loaded - started, "seconds to the batch": time.perf_counter() - loaded}
    held, marks = {}, {len(loader) * share // 10: share for share in range(1, 10)}
    for number, _ in enumerate(loader):
        if number in marks:
            held[f"{10 * marks[number]} %"] = round(memory(), 1)
    seconds, used = time.perf_counter() - started, processor_time() - before
    found = {"rows per second": rows / seconds, "rows per second of a processor": rows / used, "seconds": seconds}
    return {name: round(value, 1) for name, value in found.items()} | {"MB at": held}


def measure(rows: int, parts) -> dict:
    """Measures parts on as many rows, each in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        write_rows(Path(folder) / "rows.jsonl", rows)
        found: dict = {"rows": rows, "bytes": (Path(folder) / "rows.jsonl").stat().st_size}
        for part in parts:
            command = [sys.executable, "-m", "benchmarks.streaming", "--part", part, "--folder", folder]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
            found[part] = json.loads(done.stdout.splitlines()[-1])
            print(part, found[part], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000, help="Of the comparison with prepared rows.")
    parser.add_argument("--many", type=int, default=1_000_000, help="Rows over which memory is watched.")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "streaming.json")
    parser.add_argument("--part", help="Measure one part of --folder, for this command's own use.")
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    if args.part:
        print(json.dumps(run_part(args.part, args.folder)))
        return
    compared, many = measure(args.rows, PARTS), measure(args.many, PARTS_OF_MANY)

    def ratios(figure: str) -> dict:
        return {part: round(compared[part][figure] / compared["prepared"][figure], 3) for part in PARTS}

    held = many["streamed by 2 workers"]["MB at"]
    results = {
        "cpu_cores": os.cpu_count(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "tokenizers", "datasets")},
        "rows per second, streamed : prepared": ratios("rows per second"),
        "rows per second of a processor, streamed : prepared": ratios("rows per second of a processor"),
        "memory at 90 % : at 10 %": round(held["90 %"] / held["10 %"], 3),
        "compared": compared,
        "many": many,
    }
    args.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
