"""The command `infer` in this process: what it prints, and the file it writes."""

import tiny
from conftest import write_rows

from utils.infer.load import check_trained
from utils.script import infer


def load(**values):
    args = infer.InferArgs(**values)
    return infer.load_chat(args, check_trained(args)[0])


def printed(capsys, *flags):
    capsys.readouterr()
    infer.main(list(flags))
    return capsys.readouterr().out


ROWS = [*tiny.ROWS, {"messages": [{"role": "user", "content": "Hi"}]}, *tiny.PAIRS]


def answered(model, folder, rows, *flags, output="answers.jsonl"):
    """Answers rows with the command, in this process; returns the file it leaves."""
    file = write_rows(folder / "rows.jsonl", rows)
    infer.main(["--model_path", str(model), "--input", file, "--output", str(folder / output), "--dtype", "float32",
                "--max_new_tokens", "12", "--batch_size", "4", *flags])  # fmt: skip
    assert sorted(path.name for path in folder.iterdir()) == sorted(["rows.jsonl", output])
    return folder / output
