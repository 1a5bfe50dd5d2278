"""System calls observed and made to fail by strace, which knows nothing of the program's hooks."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

needs_strace = pytest.mark.skipif(
    shutil.which("strace") is None, reason="strace is not installed (apt-get install strace)"
)

# Every call by which a process changes, or opens, what is on a disk. Not close: making it fail
# would keep the descriptor open, which no disk does.
CALLS = (
    "openat,mkdir,mkdirat,write,pwrite64,writev,fsync,fdatasync,rename,renameat,renameat2,link,"
    "linkat,symlink,unlink,unlinkat,rmdir,ftruncate,fallocate,fchmod,chmod,flock"
)


# No threads, which do not survive a fork; and how often a bar is drawn depends on the time.
ALONE = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}


@dataclass(frozen=True)
class Call:
    """The `number`-th call of its name in a process, counted from 1."""

    name: str
    number: int
    line: str

    def __str__(self) -> str:
        return f"{self.name} {self.number}"


def attach(pid: int, log: Path, *options: str) -> subprocess.Popen:
    """A strace of a stopped process, in force when this returns."""
    tracer = subprocess.Popen(
        ["strace", "-qq", "-p", str(pid), "-o", str(log), "-y", "-e", f"trace={CALLS}", *options],
        stderr=subprocess.PIPE,
        text=True,
    )
    while f"TracerPid:\t{tracer.pid}\n" not in Path(f"/proc/{pid}/status").read_text():
        if tracer.poll() is not None:
            raise RuntimeError(f"strace: {tracer.stderr.read()}")  # pyright: ignore
        time.sleep(0.001)
    return tracer


def calls_on(directory: Path, log: Path) -> list[Call]:
    """The calls in a log that name `directory`, or anything in it, in their order."""
    found, counted = [], Counter()
    inside = re.compile(re.escape(str(directory)) + r'[/">]')
    for line in log.read_text().splitlines():
        match = re.match(r"(?:\d+ +)?(\w+)\(", line)
        if match is None:
            continue  # a signal, an exit
        counted[match.group(1)] += 1
        if inside.search(line):
            found.append(Call(match.group(1), counted[match.group(1)], line))
    return found


class Server:
    """A module that serves forks (`forks.serve`), everything imported once for all of them."""

    def __init__(self, module: str, *arguments: object) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **ALONE},
        )

    def run(self, output_dir: Path, log: Path | None = None, *options: str) -> int:
        """Run in `output_dir`, under strace if there is a `log`; the exit code, negative for a
        signal.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{output_dir}\n")
        self.process.stdin.flush()
        pid = int(self.process.stdout.readline())
        tracer = None if log is None else attach(pid, log, *options)
        os.kill(pid, signal.SIGCONT)
        code = int(self.process.stdout.readline())
        if tracer is not None:
            tracer.communicate()
        return code

    def close(self) -> None:
        self.process.communicate()
