"""A program in a fork of the server is like one that Python starts."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from fork_server import PYTHON, can_fork, fast_python

SHOWN = (
    "import json, os, sys\n"
    "print(json.dumps([sys.argv[1:], os.getcwd(), sys.path[0], os.environ['SEEN'], sys.stdin.read(), __name__]))\n"
    "print('here', file=sys.stderr)\nsys.exit(7)\n"
)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not can_fork(), reason="os.pidfd_open is needed")]


def both(words, **options):
    """What a program does in a fork, and by Python itself."""
    options = {"env": {**os.environ, "SEEN": "yes"}, "capture_output": True, "text": True, "timeout": 100, **options}
    done = [subprocess.run([python, *words], **options) for python in (fast_python(), PYTHON)]
    return [(one.returncode, one.stdout, one.stderr) for one in done]


@pytest.mark.parametrize("kind", ["script", "module", "code"])
def test_arguments_folder_environment_streams_and_exit_code(kind, tmp_path):
    (tmp_path / "shown.py").write_text(SHOWN)
    words = {"script": ["-u", "shown.py"], "module": ["-m", "shown"], "code": ["-c", SHOWN]}[kind]
    ours, theirs = both([*words, "a", "-b c"], cwd=tmp_path, input="typed\n")
    assert ours == theirs and ours[0] == 7 and ours[2] == "here\n"
    folder = "" if kind == "code" else str(tmp_path)
    assert json.loads(ours[1]) == [["a", "-b c"], str(tmp_path), folder, "yes", "typed\n", "__main__"]


@pytest.mark.parametrize("code", ["1", "1 / 0", "raise SystemExit('no')", "raise KeyboardInterrupt",
                                  "import os; os.kill(os.getpid(), 9)", "import os; os._exit(5)"])  # fmt: skip
def test_how_it_ends(code):
    ours, theirs = both(["-c", f"print(1, flush=True); {code}"])
    assert ours[:2] == theirs[:2] and ours[2].splitlines()[-1:] == theirs[2].splitlines()[-1:]


def test_its_libraries_are_imported_and_this_project_is_not():
    code = "import sys; print({'torch', 'trl', 'peft'} <= set(sys.modules), 'utils' in sys.modules, sys.executable)"
    done = subprocess.run([fast_python(), "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False", fast_python()]


def test_sitecustomize_and_pythonpath(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("print('first')\n")
    ours, theirs = both(["-c", "import sys; print(sys.path[1])"], env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert ours == theirs == (0, f"first\n{tmp_path}\n", "")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_to_the_command_reaches_the_program(signum):
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(100)"
    command = subprocess.Popen(
        [fast_python(), "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    program = int(command.stdout.readline())
    command.send_signal(signum)
    assert command.wait(20) == -signum
    for _ in range(200):
        if not psutil.pid_exists(program):
            break
        time.sleep(0.05)
    assert not psutil.pid_exists(program)


def test_the_fixtures(fast_processes, request):
    assert sys.executable == fast_python() and (Path(sys.executable).parent / "deepspeed").is_file()
    request.getfixturevalue("real_processes")
    assert sys.executable == PYTHON
