"""A function in a process of its own, which may be killed: for the tests of exercises 4 and 5."""

import itertools
import os
import pickle
import random
import signal
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

SECONDS = 60  # after which it is killed, whatever it does
CALLS = ("mkdir", "fsync", "rename", "replace", "unlink", "rmdir")

# Imports much when it is called first: here, and not in every process.
torch.optim.AdamW([torch.zeros(1, requires_grad=True)])


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


def listen(patch: pytest.MonkeyPatch, before: Callable[..., object]) -> None:
    """Have `before(name, *arguments)` called before each of CALLS, which are functions of `os`."""
    for name in CALLS:
        own = getattr(os, name)

        def call(*arguments, own=own, name=name, **keywords):
            before(name, *arguments)
            return own(*arguments, **keywords)

        patch.setattr(os, name, call)


def killed_before(call: int, work: Callable[..., object], *arguments: Any) -> bool:
    """Whether `work(*arguments)`, in a process of its own, was killed before its system call number
    `call` (0, 1, ...), or had fewer.
    """

    def in_there(tell) -> None:
        calls = itertools.count()
        listen(pytest.MonkeyPatch(), lambda *_: next(calls) == call and kill_this_process())
        work(*arguments)

    ended = in_a_process(in_there)
    assert not ended.error, ended.error
    return ended.killed


def scatter_generators() -> None:
    """Random generators stand elsewhere in each process."""
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(os.getpid())


def kill_in_save(number: int) -> None:
    """This process dies in its torch.save number `number` (1, 2, ...), the file half written."""
    save, numbers = torch.save, itertools.count(1)

    def save_half(value, file, *arguments, **keywords) -> None:
        save(value, file, *arguments, **keywords)
        if next(numbers) == number:
            path = file if isinstance(file, str | os.PathLike) else getattr(file, "name", None)
            if path is not None:  # not in memory
                os.truncate(path, 500)
            kill_this_process()

    torch.save = save_half
