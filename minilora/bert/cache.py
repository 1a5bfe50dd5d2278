"""Arrays that lie in files, not in memory, and are kept between runs.

    ~/.cache/minilora/<key>/     (or under XDG_CACHE_HOME); safe to delete at any time

The key is a hash of everything the arrays depend on. They are written piece by piece and mapped:
the system brings in what is looked at, and processes share it. What is read is checked against its
own hash; whatever is wrong with a file, or with the directory, the arrays are made anew. Where they
cannot be kept, they lie in nameless files of the temporary directory; without one, in memory.
"""

import contextlib
import functools
import hashlib
import json
import mmap
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from minilora.bert.examples import Arrays
from minilora.errors import MiniloraError
from minilora.files import is_leftover, remove_directory, scratch_directory
from minilora.reading import read_json

INDEX = "arrays.json"  # written last
DAY = 24 * 60 * 60  # seconds; what is older and unfinished was left by a killed process

Pieces = Callable[[], Iterator[Arrays]]


def mapped(key: Any, pieces: Pieces) -> Arrays:
    """The arrays kept under `key`, which is JSON, read-only, or what the `pieces` are end to end,
    kept from now on. Nothing is kept under None.
    """
    entry = None if key is None else _entry_of(key)
    if entry and (found := _read(entry)):
        return found
    # A full disk or a home that cannot be written costs time, not the run.
    with contextlib.suppress(OSError):
        if entry:
            return _keep(entry, pieces())
    with contextlib.suppress(OSError), tempfile.TemporaryDirectory() as directory:
        return _write(Path(directory), pieces())
    return joined(pieces())


def joined(pieces: Iterator[Arrays]) -> Arrays:
    """The same in memory."""
    made = list(pieces)
    return {name: np.concatenate([piece[name] for piece in made]) for name in made[0]}


def release(array: np.ndarray) -> None:
    """Let what was looked at of an array in a file be no more a part of this process."""
    if file := getattr(array, "_mmap", None):
        file.madvise(mmap.MADV_DONTNEED)


def digest(value: Any) -> str:
    """SHA-256 of a value as JSON."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _entry_of(key: Any) -> Path | None:
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    return home / "minilora" / digest([_code(), key]) if home.is_absolute() else None


@functools.cache
def _code() -> str:
    # Of all that reads files, tokenises and labels: what it makes may change with any line of it.
    found = hashlib.sha256()
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        found.update(file.read_bytes())
    return found.hexdigest()


def _keep(entry: Path, pieces: Iterator[Arrays]) -> Arrays:
    entry.parent.mkdir(parents=True, exist_ok=True)
    for other in entry.parent.iterdir():
        if is_leftover(other.name) and other.stat().st_mtime < time.time() - DAY:
            shutil.rmtree(other)
    with scratch_directory(entry) as directory:
        arrays = _write(directory, pieces)
        # Where another process was faster, its arrays are the same: ours go without a name.
        with contextlib.suppress(OSError):
            if entry.exists() and _read(entry) is None:
                remove_directory(entry)
            os.rename(directory, entry)
        return arrays


def _write(directory: Path, pieces: Iterator[Arrays]) -> Arrays:
    kinds = {}
    for piece in pieces:
        for name, array in piece.items():
            with (directory / name).open("ab") as file:
                file.write(array.tobytes())
            kind = [array.dtype.str, array.shape[1:]]
            assert kinds.setdefault(name, kind) == kind
    index = {name: [*kind, _sha256(directory / name)] for name, kind in kinds.items()}
    (directory / INDEX).write_text(json.dumps({"arrays": index, "sha256": digest(index)}))
    return {name: _map(directory / name, *kind) for name, kind in kinds.items()}


def _read(entry: Path) -> Arrays | None:
    try:
        found = read_json(entry / INDEX)
        if digest(found.get("arrays")) != found.get("sha256"):
            return None
        index = found["arrays"].items()
        if any(_sha256(entry / name) != sha256 for name, (*_, sha256) in index):
            return None
        return {name: _map(entry / name, *kind) for name, (*kind, _) in index}
    except (OSError, MiniloraError):
        return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _map(path: Path, dtype: str, inner: tuple[int, ...]) -> np.ndarray:
    # An empty file cannot be mapped.
    flat = np.memmap(path, dtype, "r") if path.stat().st_size else np.zeros(0, dtype)
    return flat.reshape(-1, *inner)
