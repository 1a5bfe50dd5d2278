"""A process that has imported everything, and forks a run for each directory it is told.

A fork waits, stopped, until it is told to go on, so that a tracer can be attached before its first
system call. What it says goes to `<directory>.stderr`.
"""

import contextlib
import os
import signal
import sys
import tempfile
import traceback
import typing
from collections.abc import Callable
from pathlib import Path

import torch

from minilora.command import run_command


def serve(run: Callable[[Path], int]) -> None:
    """Call `run` in a fork for each line of stdin; print the fork's process id, and at its end its
    exit status.
    """
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory, contextlib.redirect_stdout(sys.stderr):
        run(Path(directory, "warm"))  # what is imported late is imported now, not in every fork
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            _be_a_run(run, Path(line.rstrip("\n")))
        os.waitpid(pid, os.WUNTRACED)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def _be_a_run(run: Callable[[Path], int], directory: Path) -> typing.NoReturn:
    said = os.open(f"{directory}.stderr", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    os.kill(os.getpid(), signal.SIGSTOP)
    try:
        run_command(lambda: run(directory))
    except SystemExit as ended:
        sys.stdout.flush()
        os._exit(int(ended.code or 0))
    except BaseException:
        traceback.print_exc()
    os._exit(99)
