"""A run's directory: `run.json`, `metrics.jsonl`, and checkpoints written in their turn.

What is done about a disk that refuses stands here, too: a row or a checkpoint that cannot be
written is no reason to lose a run that can go on.
"""

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from minilora import files
from minilora.errors import MiniloraError
from minilora.reading import read_json
from minilora.training.checkpoint import save_checkpoint, sorted_checkpoints
from minilora.training.loop import Training, is_finished
from minilora.training.optim import beyond_trainer
from minilora.training.progress import say
from minilora.training.record import RunRecord

RUN_NAME = "run.json"
METRICS_NAME = "metrics.jsonl"

# What a user can do about a disk that refuses.
REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room"),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "make it writable"),
    errno.EIO: "see to the disk",
}


def new_output_dir(path: Path) -> None:
    """Create the directory of a new run; what a killed start left in it counts as nothing."""
    if path.exists() and not path.is_dir():
        raise MiniloraError(f"output_dir {str(path)!r} is a file: give a new or empty directory")
    entries = path.iterdir() if path.is_dir() else []
    held = sorted(entry.name for entry in entries if not files.is_leftover(entry.name))
    if held:
        advice = f"give a new one, or continue its run with --resume_from_checkpoint {path}"
        holds = f"is not empty (it holds {held[0]})"
        raise MiniloraError(f"output_dir {str(path)!r} {holds}: {advice}")
    files.make_directory(path)


@contextlib.contextmanager
def holding(output_dir: Path, is_new: bool) -> Iterator[None]:
    """Inside, a run's directory is this process's alone, and holds nothing half-written."""
    with advice_on_disk_errors(output_dir):
        if is_new:
            new_output_dir(output_dir)
        with files.exclusive(output_dir):
            files.sweep_leftovers(output_dir)
            yield


def write_run(output_dir: Path, record: RunRecord) -> None:
    """Before the first step, and with the result at the end."""
    text = files.json_text(record.to_json(), indent=2)
    files.write_file(output_dir / RUN_NAME, f"{text}\n".encode())


def read_run(output_dir: Path) -> RunRecord:
    path = output_dir / RUN_NAME
    return RunRecord.from_json(read_json(path), str(path))


class MetricsFile:
    """`metrics.jsonl`, holding exactly the rows of `log_history`, whole lines only.

    A row that cannot be written (disk full) is not lost: the next one writes the whole file anew.
    """

    def __init__(self, path: Path, log_history: list[dict[str, Any]]) -> None:
        """Begin with a checkpoint's rows: those that a killed run wrote after it are dropped."""
        self.path, self.rows, self.has_failed = path, log_history, False
        self._try(self.write_all)

    def append(self, row: dict[str, Any]) -> None:
        """Add `row`, which the loop has just appended to `log_history`."""
        self._try(self.write_all if self.has_failed else partial(self._append, row))

    def write_all(self) -> None:
        """Write every row, durably. An `OSError` means that rows in no checkpoint would be lost."""
        lines = [files.json_text(row) + "\n" for row in self.rows]
        files.write_file(self.path, "".join(lines).encode())

    def _append(self, row: dict[str, Any]) -> None:
        with self.path.open("ab") as file:
            file.write((files.json_text(row) + "\n").encode())

    def _try(self, write: Callable[[], None]) -> None:
        try:
            write()
            self.has_failed = False
        except OSError as error:
            if not self.has_failed:
                reason = f"cannot be written ({error.strerror}); the rows are kept for later"
                say(f"warning: {self.path} {reason}")
            self.has_failed = True


class Saver:
    """Writes the checkpoints of a run, and deletes what is over `save_total_limit`.

    When one cannot be written (the disk is full, for one) and an older one is there, it warns, lets
    the run go on and tries again at the next save; the last save of a run has no next one, and
    fails.
    """

    def __init__(self, output_dir: Path, training: Training, record: RunRecord) -> None:
        self.output_dir, self.training, self.record = output_dir, training, record
        self.failure: OSError | None = None  # of the last save
        self.remark = beyond_trainer(training.optimizer)  # once

    def save(self) -> None:
        step, limit = self.training.state.global_step, self.record.arguments.save_total_limit
        self.failure = None
        try:
            save_checkpoint(self.output_dir, self.training, self.record)
        except OSError as error:
            ends = is_finished(self.training.state, self.training.timetable)
            if ends or not sorted_checkpoints(self.output_dir):
                raise
            self.failure = error
            is_there = isinstance(error, files.NotConfirmed)
            what = f"checkpoint-{step} is" if is_there else f"no checkpoint at step {step}:"
            say(f"warning: {what} {error.strerror}; training goes on")
            return
        if self.remark is not None:
            say(self.remark)
            self.remark = None
        try:
            rotate_checkpoints(self.output_dir, limit, self.training.state.best_step)
        except OSError as error:
            say(f"warning: an old checkpoint cannot be deleted: {error.strerror}")


def rotate_checkpoints(output_dir: Path, limit: int | None, best_step: int | None) -> None:
    """Delete the oldest checkpoints beyond `limit`, never the newest and never the best."""
    checkpoints = [path for path in sorted_checkpoints(output_dir) if not path.is_symlink()]
    excess = 0 if limit is None else len(checkpoints) - limit
    oldest_first = [p for p in checkpoints[:0:-1] if p.name != f"checkpoint-{best_step}"]
    for path in oldest_first[: max(excess, 0)]:
        files.remove_directory(path)


@contextlib.contextmanager
def advice_on_disk_errors(output_dir: Path) -> Iterator[None]:
    """Let an `OSError` that comes out say what to do about it, and how the run goes on."""
    try:
        yield
    except OSError as error:
        begun = os.path.isfile(output_dir / RUN_NAME)
        go_on = f"--resume_from_checkpoint {output_dir}" if begun else "start the run again"
        remedy = REMEDIES.get(error.errno or 0, "see to it")
        advice = f"{error.strerror}; no older checkpoint is lost: {remedy}, then {go_on}"
        raise OSError(error.errno, advice, error.filename or str(output_dir)) from error
