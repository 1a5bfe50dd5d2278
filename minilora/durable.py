"""Files and directories that are complete or do not exist, whenever the process dies.

The rule for both: write under a temporary name, fsync, rename to the final name, fsync the parent.
POSIX `rename` replaces its target atomically, and the two fsyncs order the data before the name, so
that even a power loss leaves either the old state or the new one. Temporary names start with a dot:
nothing that looks for `checkpoint-<step>` (HF Trainer's `get_last_checkpoint` included) can mistake
them.

Two kinds of failure: an `OSError` says that nothing has changed, its subclass `NotConfirmed` that
everything has, but that the disk refused the last fsync, so that a power loss may undo it.
"""

import contextlib
import ctypes
import fcntl
import io
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from minilora.errors import MiniloraError

TEMPORARY = ".tmp-"
TRASH = ".trash-"
LOCK_NAME = ".minilora.lock"
# What a killed run may leave behind in its directory: "<prefix><final name>-<8 hex digits>".
LEFTOVER = re.compile(r"\.(tmp|trash)-.+-[0-9a-f]{8}")

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


class NotConfirmed(OSError):
    """What was written is whole and in its place; that it survives a power loss is not known."""


def make_directory(path: Path) -> None:
    """Create `path` and the parents it lacks, each of them durable. No error if it is there.

    Raises:
        OSError: read-only, permission, disk full, or a file is in the way.
    """
    if path.is_dir():
        return
    make_directory(path.parent)
    path.mkdir(exist_ok=True)
    _sync_directory(path.parent)


def write_file(path: Path, data: bytes) -> None:
    """Replace `path` by `data`, or leave it exactly as it was.

    Raises:
        OSError: disk full, read-only, permission; the temporary file is gone again.
        NotConfirmed: `path` is replaced.
    """
    temporary = _sibling(path, TEMPORARY)
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

    An existing directory of that name is replaced: the two change names in one step, so that there
    is no moment in which neither is there.

    Raises:
        OSError: disk full, read-only, permission; the temporary directory is gone again.
        NotConfirmed: `path` is there.
    """
    temporary = _sibling(path, TEMPORARY)
    try:
        temporary.mkdir()
        for name, data in files.items():
            _write_new(temporary / name, data)
        _sync_directory(temporary)
        if path.exists():
            _exchange(temporary, path)
        else:
            os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _confirm(path.parent)
    shutil.rmtree(temporary, ignore_errors=True)  # what was replaced, if anything was


@contextlib.contextmanager
def scratch_directory(parent: Path) -> Iterator[Path]:
    """An empty directory inside `parent`, gone afterwards; if the process dies, a leftover."""
    path = _sibling(parent / "scratch", TEMPORARY)
    path.mkdir()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A directory to fill inside the block, which takes the name `path` when the block ends well.

    For files too large to hold in memory as `commit_directory` does. If the block raises, nothing
    is left; a process that is killed leaves a `.tmp-...` beside `path`, which nothing reads.

    Raises:
        MiniloraError: `path` exists.
    """
    if os.path.lexists(path):
        raise MiniloraError(f"{path} exists: give a new name, or move it away")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _sibling(path, TEMPORARY)
    temporary.mkdir()
    try:
        yield temporary
        for file in filter(Path.is_file, temporary.rglob("*")):
            _give_default_mode(file)
            _sync_file(file)
        _sync_directory(temporary)
        os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync_directory(path.parent)


@contextlib.contextmanager
def new_lines(path: Path | None) -> Iterator[Callable[[str], None]]:
    """A function that adds one line to the new file `path`, or without one to standard output.

    Each line is handed to the kernel in one piece, at once: a process that is killed leaves whole
    lines. A file to which nothing was written when the block raises is removed.

    Raises:
        MiniloraError: `path` exists, or there is no such directory.
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
    trash = _sibling(path, TRASH)
    os.rename(path, trash)
    _sync_directory(path.parent)
    shutil.rmtree(trash)


def set_aside(path: Path, reason: str) -> Path:
    """Rename a directory (or link) to `.<reason>-<name>-<random>`, out of every reader's sight, and return
    its new path.
    """
    aside = _sibling(path, f".{reason}-")
    os.rename(path, aside)
    _sync_directory(path.parent)
    return aside


def sweep_leftovers(directory: Path) -> None:
    """Delete what a killed run left half-written or half-deleted. Call only while holding the lock."""
    for entry in directory.iterdir():
        if LEFTOVER.fullmatch(entry.name) and not entry.is_symlink():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def is_leftover(name: str) -> bool:
    """Whether a file name is one that only a killed run or a lock leaves behind."""
    return name == LOCK_NAME or LEFTOVER.fullmatch(name) is not None


@contextlib.contextmanager
def exclusive(directory: Path) -> Iterator[None]:
    """Hold `directory` for this process alone.

    The kernel drops a `flock` when its process dies, so a stale lock file is never in the way.

    Raises:
        MiniloraError: another live process holds it.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    descriptor = os.open(directory / LOCK_NAME, flags, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise MiniloraError(
                f"{directory} is in use by another run: wait for it to end, or give another --output_dir"
            ) from None
        yield
    finally:
        os.close(descriptor)


def is_held(directory: Path) -> bool:
    """Whether a live process holds `directory`. Changes nothing."""
    try:
        descriptor = os.open(directory / LOCK_NAME, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)


def _sibling(path: Path, prefix: str) -> Path:
    return path.with_name(f"{prefix}{path.name}-{uuid.uuid4().hex[:8]}")


def _write_new(path: Path, data: bytes) -> None:
    # O_EXCL: never write through a file or symbolic link that somebody else put there.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(descriptor)


def _give_default_mode(path: Path) -> None:
    # What the umask gives to a file made by open(); safetensors' own writer leaves 0600.
    probe = path.with_name(f"{TEMPORARY}mode")
    _write_new(probe, b"")
    path.chmod(probe.stat().st_mode & 0o777)
    probe.unlink()


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _confirm(directory: Path) -> None:
    try:
        _sync_directory(directory)
    except OSError as error:
        reason = f"written, but not confirmed by the disk ({error.strerror})"
        raise NotConfirmed(error.errno, reason, str(directory)) from error


def _exchange(one: Path, other: Path) -> None:
    # rename(2) replaces only an empty directory, and Python has no renameat2(2).
    renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    names = (AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other))
    if renameat2(*names, ctypes.c_uint(RENAME_EXCHANGE)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(other))
