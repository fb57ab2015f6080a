"""Flags of runs to explain, and what the command prints."""

from utils.script.explain import main

DPO = ["--train_args_path", "train_args/dpo/base.py"]
SINGLE = [*DPO, "--task_type", "dpo_single"]
PRETRAIN = ["--train_args_path", "train_args/pretrain/base.py"]
FULL = ["--train_mode", "full"]
EVAL = ["--val_size", "2"]


def printed(capsys, *argv) -> str:
    capsys.readouterr()
    main(list(argv))
    return capsys.readouterr().out
