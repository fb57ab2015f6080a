"""Kills a run at many moments, resumes it each time, and compares what it ends with; run by test_survive.py.

    python tests/helpers/kill_often.py SCRATCH 20 --model_name_or_path … --max_steps 8 …

Imports once and forks for each run, so that a moment costs a second. Prints a line of JSON for each.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import peft  # noqa: E402, F401
import trl  # noqa: E402, F401
from killing import Chances  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import Trainer  # noqa: E402, F401

import main_train  # noqa: E402
from utils.runtime.command import run_command  # noqa: E402


def forked(argv: list[str], folder: Path, number: int = 0, *signums: int) -> tuple[int, str]:
    """Runs main_train.py in a child; returns its exit code, negative for a signal, and its output."""
    file = folder.parent / "output.txt"
    child = os.fork()
    if child == 0:
        out = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        code = 0
        try:
            chances = Chances(folder, number, *signums)
            chances.install()
            run_command(lambda: main_train.main([*argv, "--output_dir", str(folder)]))
            (folder.parent / "chances.txt").write_text(str(chances.count))
        except SystemExit as stop:
            code = stop.code or 0
        except BaseException:
            import traceback

            traceback.print_exc()
            code = 99
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), file.read_text(encoding="utf-8", errors="replace")


def same_weights(folder: Path, other: Path) -> bool:
    ours, theirs = (load_file(path / "adapter_model.safetensors") for path in (folder, other))
    return ours.keys() == theirs.keys() and all((ours[name] == theirs[name]).all() for name in ours)


def go_on(argv: list[str], folder: Path) -> tuple[int, str]:
    """What a user types after a crash: resume, or, where nothing was saved yet, once more from the start."""
    code, output = forked([*argv, "--resume_from_checkpoint", "true"], folder)
    if code == 2 and "holds no complete checkpoint" in output:
        code, output = forked([*argv, "--overwrite_output_dir", "true"], folder)
    return code, output


def main() -> None:
    scratch, times, argv = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    code, output = forked(argv, scratch / "undisturbed")
    assert code == 0, output
    chances = int((scratch / "chances.txt").read_text())
    for moment in range(times):
        number = 1 + (chances - 1) * moment // (times - 1)
        folder = scratch / "killed"
        shutil.rmtree(folder, ignore_errors=True)
        killed, _ = forked(argv, folder, number, signal.SIGKILL)
        whole = sorted(path.name for path in folder.glob("checkpoint-*") if (path / "complete.json").is_file())
        code, output = go_on(argv, folder)
        same = code == 0 and same_weights(folder, scratch / "undisturbed")
        result = {"chance": number, "of": chances, "killed": killed, "whole": whole, "code": code, "same": same}
        print(json.dumps(result | ({} if same else {"output": output[-2000:]})), flush=True)


if __name__ == "__main__":
    main()
