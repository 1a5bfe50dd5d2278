"""A function in a process of its own, which may be killed: for the tests of exercises 4 and 5."""

import os
import pickle
import signal
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

SECONDS = 60  # after which it is killed, whatever it does


@dataclass
class Ended:
    told: list[Any]  # what the function told, up to its end
    killed: bool
    error: str  # the traceback of an exception, or empty


def in_a_process(work: Callable[[Callable[[Any], None]], None]) -> Ended:
    """Call `work(tell)` in a fork of this process. What it gives to `tell` is here, even if it is
    killed afterwards.
    """
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # python 3.12 on forks of a process with threads
        child = os.fork()
    if child == 0:
        try:
            os.close(reader)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(SECONDS)
            pipe = os.fdopen(writer, "wb", buffering=0)
            try:
                work(lambda thing: pipe.write(pickle.dumps(("told", thing))))
            except BaseException:
                pipe.write(pickle.dumps(("error", traceback.format_exc())))
        finally:
            os._exit(0)
    os.close(writer)
    ended = Ended([], False, "")
    with os.fdopen(reader, "rb") as pipe:
        try:
            while True:
                kind, thing = pickle.load(pipe)
                if kind == "told":
                    ended.told.append(thing)
                else:
                    ended.error = thing
        except EOFError:
            pass
    ended.killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
    return ended


def kill_this_process() -> None:
    """As the power switch does: no handler runs, nothing is flushed, nothing is tidied up."""
    os.kill(os.getpid(), signal.SIGKILL)
