"""Where a command's output goes: a reader who has left, a full disk, a terminal that is not UTF-8."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

PRINTS = "from utils.runtime.command import run_command; run_command(lambda: print('→ ready\\n' * {}))"


def start(code, **env):
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_reader_who_has_left(lines, unbuffered):
    process = start(PRINTS.format(lines), PYTHONUNBUFFERED=unbuffered)
    process.stdout.close()
    said = process.stderr.read()
    assert (process.wait(60), said) == (141, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux alone has it")
def test_a_full_disk():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", PRINTS.format(1)], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "No space left on device" in done.stderr


def test_a_terminal_that_is_not_utf8():
    said, wrong = start(PRINTS.format(1), PYTHONIOENCODING="ascii").communicate(timeout=60)
    assert (said.strip(), wrong) == ("\\u2192 ready", "")


def test_an_error_of_another_file_is_no_matter_of_stdout():
    code = "from utils.runtime.command import run_command; run_command(lambda: open('/nowhere/at/all'))"
    process = start(code)
    assert "FileNotFoundError" in process.communicate(timeout=60)[1]
    assert process.returncode == 1


@pytest.mark.parametrize(("message", "printed"), [("", "\ninterrupted\n"), ("Go on so", "\ninterrupted. Go on so\n")])
def test_an_interrupt_prints_how_to_continue(message, printed):
    code = "from utils.runtime.command import run_command\ndef main(): raise KeyboardInterrupt({!r})\nrun_command(main)"
    process = start(code.format(message))
    assert process.communicate(timeout=60)[1] == printed and process.returncode == 130
