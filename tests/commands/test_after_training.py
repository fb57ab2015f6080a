"""docs/after_training.md: each command as printed, on a run of the embedded model."""

import json
import os
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT
from fork_server import fast_processes
from pages import commands
from test_serve import COMMAND as SERVE

COMMANDS = commands("docs/after_training.md")
OURS = [command for command in COMMANDS if command.startswith("python ") and "gguf" not in command]
# other programs, which the page says are not run here, but for the server (test_serve.py) and its installation
OTHERS = ("pip install", "vllm serve", "ollama create", "python convert_hf_to_gguf.py", SERVE)
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fast_processes")]


def test_every_command_is_ours_or_a_named_other():
    assert len(OURS) == 9
    assert [one for one in COMMANDS if one not in OURS and not one.startswith(OTHERS)] == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the commands are typed: a run in output/sft, and the first rows of the files they name."""
    folder = tmp_path_factory.mktemp("after")
    (folder / "data").mkdir()
    for name in ("sft_data", "sft_eval_data", "choices_data"):
        lines = (ROOT / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / "data" / f"{name}.jsonl").write_text("".join(lines[:6]), encoding="utf-8")
    (folder / "rows.jsonl").write_text('{"instruction": "What is 7 + 8?"}\n')
    with fast_processes():
        type_in(
            folder, f"python main_train.py --model_name_or_path {ROOT}/data/tiny_model --output_dir output/sft "
            "--train_data_path data/sft_data.jsonl --max_steps 4 --precision fp32 --logging_steps 1",
        )  # fmt: skip
    return folder


def type_in(folder, command, text=""):
    """Runs a command of the page in `folder`, with `text` for its keyboard; returns what it printed."""
    later = sorted(path.name for path in (folder / "output").glob("sft-*"))
    command = command.replace("sft-<time>", later[0] if "compare_runs" in command else "sft")
    words = shlex.split(command.replace("main_train.py", str(ROOT / "main_train.py")))
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *words[1:]], cwd=folder, env=env, input=text, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout + done.stderr


def losses(run):
    state = json.loads((run / "trainer_state.json").read_text(encoding="utf-8"))
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def test_each_command_of_after_training(folder):
    output = folder / "output"
    for command in OURS:
        said = type_in(folder, command, text="What is 7 + 8?\n/exit\n")
        if "--input" in command:
            answer = json.loads((folder / "answers.jsonl").read_text(encoding="utf-8"))
            assert answer["messages"][0]["content"] == "What is 7 + 8?" and answer["answer"]
        elif "--output " in command and "evaluate" in command:
            file = command.split("--output ")[1].replace(".jsonl", ".summary.json")
            assert len(json.loads((folder / file).read_text(encoding="utf-8"))["figures"]) == 2  # the run and its base
        elif command.endswith("train_args.json"):
            (repeated,) = output.glob("sft-*")
            assert losses(repeated) == losses(output / "sft")
        elif "--learning_rate" in command:
            changed = max(output.glob("sft-*"), key=lambda path: path.name)
            before, after = losses(output / "sft"), losses(changed)
            assert after[0] == before[0] and after[-1] != before[-1]
        elif "merge_lora" in command:
            merged = folder / command.split("--output_dir ")[1].split()[0]
            assert (merged / "model.safetensors").is_file()
            assert (merged / "Modelfile").is_file() == ("--modelfile" in command)
        elif "compare_runs" in command:
            assert (folder / "compare.png").is_file() and "output_dir" not in said


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_a_run_without_weights_never_says_that_it_finished(mode, train, monkeypatch, tmp_path):
    """As under a backend that saves the parts of each process alone."""
    from utils.run import save
    from utils.runtime.errors import UserError

    monkeypatch.setattr(save, "save_weights", lambda trainer, args, folder: (folder / "zero_to_fp32.py").touch())
    with pytest.raises(UserError, match="no weights were saved"):
        train("--train_mode", mode, "--max_steps", "1")
    assert not (tmp_path / "run" / "train_args.json").exists()
