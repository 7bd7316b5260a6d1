"""Imports what takes long, once, and then forks a process for each program that it is given.

It is run as a script, with a socket's number and the modules' names as arguments. Each message on
the socket is a program's arguments, folder and environment, with the pipes for its output and one
on which its process id and its exit code are said.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import signal
import socket
import sys
import time
import types
from typing import Any

LONGEST = 1 << 20


def serve(requests: socket.socket) -> dict[str, Any] | None:
    """Fork for each message; in a child, what it is to run, and None once nobody asks any more."""
    # Nobody waits for those that wait for the programs.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        message, pipes, _, _ = socket.recv_fds(requests, LONGEST, 3)
        if not message:
            return None
        if os.fork() == 0:
            requests.close()
            return _child(json.loads(message), *pipes)
        for pipe in pipes:
            os.close(pipe)


def _child(asked: dict[str, Any], out: int, err: int, told: int) -> dict[str, Any]:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    program = os.fork()
    if program:
        os.close(out)
        os.close(err)
        os.write(told, b"%d\n" % program)
        _, status = os.waitpid(program, 0)
        os.write(told, b"%d\n" % os.waitstatus_to_exitcode(status))
        os._exit(0)
    os.close(told)
    for number, pipe in ((1, out), (2, err)):
        os.dup2(pipe, number)
        os.close(pipe)
    return asked


def run(asked: dict[str, Any]) -> None:
    """Become the program, as the interpreter would that is given these arguments."""
    os.environ.clear()
    os.environ.update(asked["environment"])
    time.tzset()
    os.chdir(asked["folder"])
    first, *rest = asked["arguments"]
    sys.orig_argv[1:] = asked["arguments"]
    if first == "-m":
        sys.argv[:] = ["-m", *rest[1:]]
        sys.path.insert(0, os.getcwd())
        runpy._run_module_as_main(rest[0])  # type: ignore[attr-defined]
        return
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    if first == "-c":
        name, text = "<string>", rest.pop(0)
        sys.path.insert(0, "")
    else:
        name = main.__file__ = first
        with open(first, encoding="utf-8") as file:
            text = file.read()
        sys.path.insert(0, os.path.dirname(os.path.abspath(first)))
    sys.argv[:] = [first, *rest]
    exec(compile(text, name, "exec"), main.__dict__)


if __name__ == "__main__":
    # This file's folder, in the place of which is the program's.
    del sys.path[0]
    number, *names = sys.argv[1:]
    for each in names:
        importlib.import_module(each)
    gc.collect()
    gc.freeze()
    if (given := serve(socket.socket(fileno=int(number)))) is not None:
        run(given)
