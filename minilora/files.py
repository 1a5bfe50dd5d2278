"""Files and directories that are complete or do not exist, whenever the process dies.

The rule for both: write under a temporary name, fsync, rename to the final name, fsync the parent.
POSIX `rename` replaces its target atomically, and the two fsyncs order the data before the name, so
that even a power loss leaves either the old state or the new one. Temporary names start with a dot:
nothing that looks for `checkpoint-<step>` (HF Trainer's `get_last_checkpoint` included) sees them.

An `OSError` says that nothing has changed, except for its subclass `NotConfirmed`.
"""

import contextlib
import fcntl
import io
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from minilora.errors import MiniloraError

LOCK_NAME = ".minilora.lock"
# What a killed run may leave behind in its directory: "<prefix><final name>-<8 hex digits>".
LEFTOVER = re.compile(r"\.(tmp|trash)-.+-[0-9a-f]{8}")


class NotConfirmed(OSError):
    """Everything has changed, but the disk refused the last fsync: a power loss may undo it."""


def json_text(value: Any, indent: int | None = None) -> str:
    """A value as JSON, null standing for NaN and infinity; if indented, its keys are sorted."""
    finite = json.loads(json.dumps(value), parse_constant=lambda name: None)
    return json.dumps(finite, indent=indent, sort_keys=indent is not None, allow_nan=False)


def make_directory(path: Path) -> None:
    """Create `path` and the parents it lacks, each of them durable. No error if it is there."""
    if path.is_dir():
        return
    make_directory(path.parent)
    path.mkdir(exist_ok=True)
    sync(path.parent)


def write_file(path: Path, data: bytes) -> None:
    """Replace `path` by `data`, or leave it exactly as it was."""
    temporary = _sibling(path, ".tmp-")
    try:
        _write_new(temporary, data)
        os.rename(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    _confirm(path.parent)


def commit_directory(path: Path, files: Mapping[str, bytes]) -> None:
    """Create the directory `path` holding `files`, written in their order; all of it, or nothing.

    One of that name with the same files stays. Another is moved away just before the new one takes
    its name: a crash between the two leaves neither under it, the old one whole as a leftover.
    """
    if path.is_dir():
        there = {file.name: file.read_bytes() for file in path.iterdir() if file.is_file()}
        if there == dict(files):
            return _confirm(path.parent)
    replaced = _sibling(path, ".trash-")
    with scratch_directory(path) as temporary:
        for name, data in files.items():
            _write_new(temporary / name, data)
        sync(temporary)
        try:
            if path.exists():
                os.rename(path, replaced)
            os.rename(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):  # nothing was moved away
                os.rename(replaced, path)
            raise
    _confirm(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)


@contextlib.contextmanager
def scratch_directory(path: Path) -> Iterator[Path]:
    """An empty directory beside `path`, gone afterwards unless the block has renamed it."""
    scratch = _sibling(path, ".tmp-")
    scratch.mkdir()
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A directory to fill inside the block, with files too large to hold in memory. It takes the
    name `path` if the block ends well, and is gone if not.
    """
    if os.path.lexists(path):
        raise MiniloraError(f"{path} exists: give a new name, or move it away")
    path.parent.mkdir(parents=True, exist_ok=True)
    with scratch_directory(path) as temporary, exclusive(temporary):
        yield temporary
        (temporary / LOCK_NAME).unlink()
        for file in filter(Path.is_file, temporary.rglob("*")):
            # What the umask gives; safetensors' own writer leaves 0600.
            file.chmod(temporary.stat().st_mode & 0o666)
            sync(file)
        sync(temporary)
        os.rename(temporary, path)
    _confirm(path.parent)


@contextlib.contextmanager
def new_lines(path: Path | None) -> Iterator[Callable[[str], None]]:
    """A function that adds a line to the new file `path`, or without one to standard output.

    Each line is handed to the kernel whole, at once: a process that is killed leaves whole lines.
    A file to which nothing was written when the block raises is removed.
    """
    try:
        file = io.FileIO(path, "x") if path else io.FileIO(1, "w", closefd=False)
    except FileExistsError:
        raise MiniloraError(f"{path} exists: give a new name, or move it away") from None
    except (FileNotFoundError, NotADirectoryError):
        raise MiniloraError(f"{path}: there is no such directory to write to") from None

    def write(line: str) -> None:
        rest = memoryview(f"{line}\n".encode())
        while rest:
            rest = rest[file.write(rest) or 0 :]

    with file:
        try:
            yield write
        except BaseException:
            if path and file.tell() == 0:
                path.unlink(missing_ok=True)
            raise


def remove_directory(path: Path) -> None:
    """Delete a directory so that a half-deleted one never bears its name."""
    shutil.rmtree(set_aside(path, "trash"))


def set_aside(path: Path, reason: str) -> Path:
    """Rename a directory or link to `.<reason>-<name>-<random>`, out of every reader's sight."""
    aside = _sibling(path, f".{reason}-")
    os.rename(path, aside)
    sync(path.parent)
    return aside


def sweep_leftovers(directory: Path) -> None:
    """Delete, under the lock, what killed processes left and nothing that a live one is filling."""
    for entry in directory.iterdir():
        if LEFTOVER.fullmatch(entry.name) and not entry.is_symlink() and not is_held(entry):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def is_leftover(name: str) -> bool:
    """Whether a file name is one that only a killed run or a lock leaves behind."""
    return name == LOCK_NAME or LEFTOVER.fullmatch(name) is not None


@contextlib.contextmanager
def exclusive(directory: Path) -> Iterator[None]:
    """Hold `directory` for this process alone. The kernel lets go of it when the process dies."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW
    with os.fdopen(os.open(directory / LOCK_NAME, flags, 0o666), "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            reason = "is in use by another run: wait for it, or give another --output_dir"
            raise MiniloraError(f"{directory} {reason}") from None
        yield


def is_held(directory: Path) -> bool:
    """Whether a live process holds `directory`. Changes nothing."""
    try:
        with open(directory / LOCK_NAME, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return isinstance(error, BlockingIOError)
    return False


@contextlib.contextmanager
def disk_errors(directory: Path) -> Iterator[None]:
    """Let what the disk refuses to tokenizers and safetensors, which are code in Rust and raise
    errors of their own, come out as the `OSError` it is.
    """
    try:
        yield
    except Exception as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(directory)) from error


def sync(path: Path) -> None:
    """Make what was written to a file, or a directory's names, safe from a power loss."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sibling(path: Path, prefix: str) -> Path:
    return path.with_name(f"{prefix}{path.name}-{uuid.uuid4().hex[:8]}")


def _write_new(path: Path, data: bytes) -> None:
    with open(path, "xb") as file:  # x: never through a file or link that lies in wait there
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _confirm(directory: Path) -> None:
    try:
        sync(directory)
    except OSError as error:
        reason = f"written, but not confirmed by the disk ({error.strerror})"
        raise NotConfirmed(error.errno, reason, str(directory)) from error
