"""A command in a fork of this process, which has torch and transformers imported: cheap enough for
hundreds, and whatever a command does to its process is gone with it.
"""

import contextlib
import importlib
import os
import resource
import select
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

# What a command imports late is imported here, not in every fork.
import minilora.trained.compare
import minilora.trained.merge
import minilora.trained.predict
import minilora.trained.report
import minilora.trained.score  # noqa: F401
from minilora.command import run_command
from tests.conftest import Finished

MEMORY = 3 << 30  # what a fork may take beyond what this process has; this machine is shared
UNEXPECTED = 99  # the exit code of a fork that died of an exception
TIMED_OUT = -signal.SIGKILL


def run_forked(
    command: str | Callable[[], int],
    *flags: object,
    seconds: float = 20,
    stop_after: float | None = None,
    stdin: str = os.devnull,
    prepare: Callable[[], object] = lambda: None,
) -> Finished:
    """How `python -m minilora.<command> <flags>` ended. After `stop_after` seconds it is told to
    stop, by SIGTERM; after `seconds`, killed. `prepare` is called in the fork before it.
    """
    main = importlib.import_module(f"minilora.{command}").main if isinstance(command, str) else None
    with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # python 3.12 on forks of a process with threads
        out, err = Path(directory, "out"), Path(directory, "err")
        child = os.fork()
        if child == 0:
            redirect(stdin, out, err)
            sys.argv = [str(command), *map(str, flags)]
            end(main or command, prepare)  # pyright: ignore[reportArgumentType]
        code = wait(child, seconds, stop_after)
        return Finished(code, out.read_text(errors="replace"), err.read_text(errors="replace"))


def wait(child: int, seconds: float, stop_after: float | None) -> int:
    process = os.pidfd_open(child)
    try:
        if stop_after is not None and not select.select([process], [], [], stop_after)[0]:
            os.kill(child, signal.SIGTERM)
        if not select.select([process], [], [], seconds)[0]:
            os.kill(child, signal.SIGKILL)
    finally:
        os.close(process)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code


def redirect(stdin: str, out: Path, err: Path) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    new = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    for number, place, mode in ((0, stdin, os.O_RDWR), (1, out, new), (2, err, new)):
        os.dup2(os.open(place, mode, 0o600), number)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)  # noqa: SIM115
    # As python opens its own: what cannot be encoded is escaped.
    sys.stderr.reconfigure(errors="backslashreplace")


def end(main: Callable[[], int], prepare: Callable[[], object]) -> None:
    code = UNEXPECTED
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        prepare()
        run_command(main)
    except SystemExit as ended:
        code = int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(code)
