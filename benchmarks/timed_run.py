"""Runs a program that trains with TRL's trainer, and notes when each step ends and how many tokens it had.

    python -m benchmarks.timed_run REPORT main_train.py --max_steps 20 …
    python -m benchmarks.timed_run REPORT -m trl.scripts.sft --max_steps 20 …

The program needs `--logging_steps 1`. It ends with its last step, saving nothing; REPORT is then a JSON file.
"""

import json
import os
import resource
import runpy
import sys
import time
from pathlib import Path


def note_steps(report: Path) -> None:
    """Has every trainer of this process write `report` after its last step, and end the process."""
    import torch
    import transformers.trainer
    from transformers import TrainerCallback

    class Notes(TrainerCallback):
        def __init__(self):
            self.ends, self.tokens = [], []

        def on_step_end(self, args, state, control, **_):
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # a kernel's call returns before its work is done
            self.ends.append(time.perf_counter())

        def on_log(self, args, state, control, logs, model, **_):
            if "num_tokens" not in logs or "loss" not in logs:
                return
            self.tokens.append(int(logs["num_tokens"]))  # since the start, without padding
            if state.global_step == state.max_steps:
                write(args, model)

    notes = Notes()

    def write(args, model):
        gpu = torch.cuda.is_available()
        peak = torch.cuda.max_memory_reserved() if gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        found = {
            "ends": notes.ends,
            "tokens": [tokens - before for before, tokens in zip([0, *notes.tokens], notes.tokens, strict=False)],
            "peak_bytes": peak,
            "attention": model.config._attn_implementation,
            "gradient_checkpointing": bool(args.gradient_checkpointing),
            "optimizer": str(getattr(args.optim, "value", args.optim)),
        }
        report.write_text(json.dumps(found), encoding="utf-8")
        sys.stdout.flush()
        os._exit(0)  # saving takes longer than the steps, and is not what is measured

    transformers.trainer.DEFAULT_CALLBACKS.append(notes)


def main(argv: list[str] | None = None) -> None:
    report, *words = sys.argv[1:] if argv is None else argv
    note_steps(Path(report))
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    main()
