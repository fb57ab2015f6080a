"""Runs a Python program in a fork of tests/helpers/fork_server.py, as if this process were that program.

    fork_client.py SOCKET COMMAND PYTHON [-u] (FILE | -m MODULE | -c CODE) ARGUMENT…

Passes arguments, working directory, environment and standard streams on, forwards signals, and ends as the program
does. With any other flag of Python it becomes PYTHON.
"""

import json
import os
import signal
import socket
import sys


def main(address: str, command: str, python: str, words: list[str]) -> None:
    flags = [word for word in words[:1] if word == "-u"]
    program = words[len(flags) :]
    if not program or (program[0].startswith("-") and program[0] not in ("-m", "-c")):
        os.execv(python, [python, *words])
    request = {"command": command, "flags": flags, "program": program, "cwd": os.getcwd(), "env": dict(os.environ)}
    server = socket.socket(socket.AF_UNIX)
    server.connect(address)
    data = json.dumps(request).encode()
    socket.send_fds(server, [len(data).to_bytes(8, "big")], [0, 1, 2])
    server.sendall(data)
    reader = server.makefile("r")
    pid = int(reader.readline())
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(signum, lambda number, _: os.kill(pid, number))
    code = int(reader.readline() or 1)  # nothing once the server is killed
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    main(*sys.argv[1:4], sys.argv[4:])
