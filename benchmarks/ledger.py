"""What losses by source and the row ledger cost: one training in which they are switched on and off in turn.

    python -m benchmarks.ledger                                     # the embedded model
    python -m benchmarks.ledger --model HuggingFaceTB/SmolLM2-135M-Instruct --template auto --batch 2 --pairs 12

Blocks of `--block` steps, each with the line of the log at its end, alternate as on, off, off, on, …, so that a
machine whose speed drifts, or that others use as well, slows both down alike. The result is the median of the ratios
within neighbouring pairs, and their quartiles: of the processor's time, which other programs hardly change, and of
the time that passed. The share of the processor's time within the functions that note losses is not blurred by
differences between blocks. All rows have the same number of tokens. Separately timed: the ledger's own work for the
rows of a step if it holds a million, and writing these. Results are added to benchmarks/results/ledger.json.
"""

import argparse
import importlib.metadata
import json
import statistics
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "ledger.json"
WARM_UP = 2  # blocks that are not counted
MANY = 1_000_000  # rows


def write_files(folder: Path, rows: int) -> str:
    """Writes two files of rows of equal length; returns them as a value of `--train_data_path`."""
    files = []
    for name, first in (("a", 1000), ("b", 5000)):
        lines = [
            json.dumps(
                {"instruction": f"What comes after the number {first + number}?", "output": "The next one. " * 8}
            )
            for number in range(rows // 2)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
        files.append(str(folder / f"{name}.jsonl"))
    return ",".join(files)


def count_own_time(trainer, own: list[float]) -> None:
    """Has the functions that note losses add the processor's seconds of each call to `own`."""

    def timed(function):
        def call(*args, **kwargs):
            started = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                own.append(time.process_time() - started)

        return call

    for name in ("add_token_losses", "_take_training"):
        setattr(trainer, name, timed(getattr(trainer, name)))


def switched(trainer, block: int, ends: list[tuple]):
    """A callback that switches the losses of rows on and off, and notes when each block ends."""
    from transformers import TrainerCallback

    on = {"ledger": trainer.ledger, "source_names": trainer.source_names}
    off = {"ledger": None, "source_names": ()}

    class Switch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step % block == 0:  # after the log of the step before
                number = state.global_step // block
                ends.append((time.process_time(), time.perf_counter()))
                for name, value in (on if number % 4 in (0, 3) else off).items():
                    setattr(trainer, name, value)

    return Switch()


def time_blocks(args: argparse.Namespace, folder: Path) -> tuple[list[float], list[float], float]:
    """Trains once.

    Returns:
        the seconds of each block, of the processor and of the clock, and the share of the processor's time in blocks
        that note losses which the functions for it take themselves.
    """
    import main_train
    import utils.train.trainer

    ends: list[tuple] = []
    own: list[float] = []
    prepare = utils.train.trainer.prepare_trainer

    def prepare_and_switch(trainer, *given):
        prepare(trainer, *given)
        count_own_time(trainer, own)
        trainer.add_callback(switched(trainer, args.block, ends))

    utils.train.trainer.prepare_trainer = prepare_and_switch
    steps = args.block * (2 * args.pairs + 2 * WARM_UP) + 1
    try:
        main_train.main([
            "--model_name_or_path", args.model, "--template_name", args.template, "--row_ledger", "true",
            "--train_data_path", write_files(folder, args.rows), "--output_dir", str(folder / "run"),
            "--max_steps", str(steps), "--logging_steps", str(args.block), "--logging_first_step", "false",
            "--per_device_train_batch_size", str(args.batch), "--save_strategy", "no", "--report_to", "none",
            "--disable_tqdm", "true", "--card_samples", "0", "--doctor", "off", "--cache_dir", str(folder / "cache"),
        ])  # fmt: skip
    finally:
        utils.train.trainer.prepare_trainer = prepare
    processor, clock = (
        [end - start for start, end in zip(times, times[1:], strict=False)] for times in zip(*ends, strict=True)
    )
    return processor, clock, 2 * sum(own) / sum(processor)  # half of the blocks note losses


def ratios(blocks: list[float]) -> list[float]:
    """Time with, divided by time without, within each pair of neighbouring blocks: on, off, off, on, …"""
    pairs = list(zip(blocks[::2], blocks[1::2], strict=False))[WARM_UP:]
    return [
        first / second if number % 2 == WARM_UP % 2 else second / first for number, (first, second) in enumerate(pairs)
    ]


def summary(found: list[float]) -> dict:
    """The median and the quartiles of ratios."""
    low, middle, high = statistics.quantiles(found, n=4)
    return {"ratio": round(middle, 4), "quartiles": [round(low, 4), round(high, 4)], "pairs": len(found)}


def time_many_rows() -> dict[str, float]:
    """Milliseconds for the rows of a step, new and known ones, at a million rows, and for writing them."""
    import numpy as np

    from utils.train.row_ledger import LedgerNote, RowLedger

    random = np.random.default_rng(0)
    ledger = RowLedger(LedgerNote(files=["rows.jsonl"], sha256=[""], sources=["rows"]))
    lines = random.permutation(2 * MANY)

    def add(first: int, step: int) -> float:
        """Adds 16 rows; returns the milliseconds of the processor."""
        rows = lines[first : first + 16]
        started = time.process_time()
        ledger.add(rows, np.full(16, step), random.random(16), np.ones(16))
        return 1000 * (time.process_time() - started)

    ledger.add(lines[:MANY], np.ones(MANY), random.random(MANY), np.ones(MANY))
    new = [add(MANY + 16 * number, number + 2) for number in range(2000)]
    known = [add(16 * number, number + 2002) for number in range(2000)]
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        ledger.write(Path(folder) / "ledger.parquet")
        written = 1000 * (time.perf_counter() - started)
        size = (Path(folder) / "ledger.parquet").stat().st_size
    return {
        "ms_of_a_step_of_16_new_rows": round(statistics.mean(new), 3),
        "ms_of_a_step_of_16_known_rows": round(statistics.mean(known), 3),
        "writing_ms": round(written),
        "bytes": size,
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="data/tiny_model")
    parser.add_argument("--name", help="the key of the result; the model's last part by default")
    parser.add_argument("--template", default="qwen")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--block", type=int, default=10, help="steps of a block, and of a line of the log")
    parser.add_argument("--pairs", type=int, default=60)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        processor, clock, own = time_blocks(args, Path(folder))
    import torch

    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    results[args.name or Path(args.model).name] = {
        "own_share_of_processor": round(own, 5),
        "processor": summary(ratios(processor)), "clock": summary(ratios(clock)),
        "steps_of_a_block": args.block, "rows_of_a_step": args.batch,
        "seconds_of_a_step": round(statistics.median(clock) / args.block, 4),
        "device": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU",
        "threads": torch.get_num_threads(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "trl", "peft")},
    }  # fmt: skip
    results[f"{MANY:,} rows"] = time_many_rows()
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
