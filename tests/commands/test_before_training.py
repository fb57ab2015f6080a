"""docs/before_training.md: each command as printed, on the embedded model and a short run of it."""

import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT
from fork_server import fast_processes
from pages import blocks, commands, read

PAGE = "docs/before_training.md"
COMMANDS = commands(PAGE)
NOT_CLEAN = {"python -m utils.script.doctor --eval_data_path data/sft_data.jsonl": 1}  # its mistake is shown there
SAID = {"doctor": "verdict", "explain": "tokens", "plan_memory": "parameters", "prove": "tolerance"}
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fast_processes")]


def test_the_page_has_the_commands_that_run():
    assert len(COMMANDS) == 14 and set(NOT_CLEAN) < set(COMMANDS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the commands are typed: with the project's data and recipes, and a run in output/sft."""
    folder = tmp_path_factory.mktemp("before")
    for name in ("data", "train_args"):
        (folder / name).symlink_to(ROOT / name)
    with fast_processes():
        done = type_in(folder, "python main_train.py --output_dir output/sft --max_steps 2 --save_strategy no")
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def type_in(folder, command):
    words = command.replace("main_train.py", str(ROOT / "main_train.py")).replace("python", sys.executable, 1)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        ["bash", "-c", words],
        cwd=folder,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=500,
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_does_as_the_page_says(folder, command):
    done = type_in(folder, command)
    assert done.returncode == NOT_CLEAN.get(command, 0), f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    command, _, file = command.partition(" > ")
    printed = (folder / file).read_text() if file else done.stdout
    assert SAID[re.search(r"script\.(\w+)", command)[1]] in printed
    if command in NOT_CLEAN:  # the page shows its finding, with the list of lines cut short
        (finding,) = blocks(read(PAGE), "text")
        assert [line for line in finding.splitlines() if "…" not in line and line not in printed] == []
