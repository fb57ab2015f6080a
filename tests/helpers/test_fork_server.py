"""A program in a fork of the server is like one that Python starts."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from fork_server import PYTHON, can_fork, fast_python

SHOWN = (
    "import json, os, sys\n"
    "print(json.dumps([sys.argv[1:], os.getcwd(), sys.path[0], os.environ['SEEN'], sys.stdin.read(), __name__]))\n"
    "print('here', file=sys.stderr)\nsys.exit(7)\n"
)
HERE = Path(__file__).parent
SERVER = (
    "import socket, fork_server as server\n"
    "request = server.Server(socket.socket(fileno={number})).serve()\nserver.finish(lambda: server.run(request))\n"
)
SLEEPS = "import os, time; print(os.getpid(), flush=True); time.sleep(100)"
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


def ends(process: int) -> bool:
    """Whether a process ends within ten seconds."""
    for _ in range(200):
        if not psutil.pid_exists(process) or psutil.Process(process).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("to_group", [False, True])
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_to_the_command_or_its_group_reaches_the_program(signum, to_group):
    command = subprocess.Popen(
        [fast_python(), "-c", SLEEPS], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        start_new_session=to_group,
    )  # fmt: skip
    program = int(command.stdout.readline())
    (os.killpg if to_group else os.kill)(command.pid, signum)
    assert command.wait(20) == -signum
    assert ends(program)


def test_the_program_gets_each_signal_once_and_its_group_is_its_own():
    code = (
        "import os, signal, time; found = []; signal.signal(signal.SIGTERM, lambda *_: found.append(1))\n"
        "print(flush=True); time.sleep(1); os.killpg(0, signal.SIGTERM); time.sleep(0.1); print(len(found))"
    )
    done = subprocess.Popen([fast_python(), "-c", code], stdout=subprocess.PIPE, text=True, process_group=0)
    done.stdout.readline()
    os.killpg(done.pid, signal.SIGTERM)
    assert done.communicate(timeout=20)[0] == "2\n" and done.returncode == 0


@pytest.fixture
def server(tmp_path):
    """A server without libraries."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "socket"))
    listener.listen()
    process = subprocess.Popen(
        [PYTHON, "-c", SERVER.format(number=listener.fileno())], stdin=subprocess.PIPE,
        pass_fds=[listener.fileno()], env={**os.environ, "PYTHONPATH": str(HERE)},
    )  # fmt: skip
    command = [PYTHON, str(HERE / "fork_client.py"), str(tmp_path / "socket"), PYTHON, PYTHON]
    yield SimpleNamespace(process=process, command=command, address=str(tmp_path / "socket"))
    process.stdin.close()
    process.wait(20)


def serves(server) -> bool:
    """Whether a server still runs programs."""
    done = subprocess.run([*server.command, "-c", "print(5)"], capture_output=True, text=True, timeout=20)
    return done.stdout == "5\n" and server.process.poll() is None


def request_to(address: str, code: str, stdout: int) -> socket.socket:
    """Sends what a client does; returns its socket."""
    request = {"command": PYTHON, "flags": [], "program": ["-c", code], "cwd": "/", "env": dict(os.environ)}
    client, data = socket.socket(socket.AF_UNIX), json.dumps(request).encode()
    client.connect(address)
    socket.send_fds(client, [len(data).to_bytes(8, "big")], [0, stdout, 2])
    client.sendall(data)
    return client


@pytest.mark.parametrize("sent", [b"", (99).to_bytes(8, "big"), (99).to_bytes(8, "big") + b'{"command": '])
def test_a_client_killed_before_its_request_is_sent(server, sent):
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(server.address)
        client.sendall(sent)
    assert serves(server)


def test_a_client_killed_before_the_reply(server):
    reading, writing = os.pipe()
    assert serves(server)
    server.process.send_signal(signal.SIGSTOP)
    request_to(server.address, SLEEPS, writing).close()
    os.close(writing)
    server.process.send_signal(signal.SIGCONT)
    assert serves(server)
    with os.fdopen(reading) as output:
        program = output.readline()
    assert not program or ends(int(program))


def test_a_client_killed_as_its_program_ends(server):
    reading, writing = os.pipe()
    client = request_to(server.address, SLEEPS, writing)
    program = int(client.makefile().readline())
    server.process.send_signal(signal.SIGSTOP)
    os.kill(program, signal.SIGKILL)
    assert ends(program)
    client.close()
    os.close(reading)
    os.close(writing)
    server.process.send_signal(signal.SIGCONT)
    assert serves(server)


def test_the_fixtures(fast_processes, request):
    assert sys.executable == fast_python() and (Path(sys.executable).parent / "deepspeed").is_file()
    request.getfixturevalue("real_processes")
    assert sys.executable == PYTHON
