"""A run's directory beside its checkpoints: `run.json`, `metrics.jsonl`, and where a resume begins.

run.json         every resolved argument, label names, fingerprints of model and data; written before the first step
metrics.jsonl    one JSON object for each log or evaluation
"""

import contextlib
import errno
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from minilora.durable import is_leftover, make_directory, set_aside, write_file
from minilora.errors import MiniloraError
from minilora.reading import read_json
from minilora.training.checkpoint import is_trainer_checkpoint, refuse_links, sorted_checkpoints
from minilora.training.manifest import CHECKPOINT, MANIFEST_NAME, verify
from minilora.training.trainer_files import read_progress

RUN_NAME = "run.json"
METRICS_NAME = "metrics.jsonl"

# What a user can do about a disk that refuses.
REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room"),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "make it writable"),
    errno.EIO: "see to the disk",
}


@dataclass(frozen=True)
class ResumePoint:
    """Where a resumed run goes on."""

    output_dir: Path
    checkpoint: Path | None
    """None: the run was stopped before its first checkpoint and starts at step 0."""
    run: dict[str, Any] | None
    """What the checkpoint, or `run.json`, records; None where HF Trainer alone has been."""


def new_output_dir(path: Path) -> None:
    """Create the directory of a new run. One that holds only leftovers of a killed start counts as
    empty.

    Raises:
        MiniloraError: it is a file, or holds something already.
    """
    if path.exists() and not path.is_dir():
        raise MiniloraError(f"output_dir {str(path)!r} is a file: give a new or empty directory")
    if path.is_dir():
        held = sorted(entry.name for entry in path.iterdir() if not is_leftover(entry.name))
        if held:
            raise MiniloraError(
                f"output_dir {str(path)!r} is not empty (it holds {held[0]}): give a new one, or continue its run with "
                f"--resume_from_checkpoint {path}"
            )
    make_directory(path)


def find_resume_point(path: Path) -> ResumePoint:
    """What resuming from `path`, a run's directory or one of its checkpoints, means. Changes
    nothing.

    Of a directory it is the highest checkpoint that verifies. A resume writes where `path` lies,
    never to a recorded place.

    Raises:
        MiniloraError: nothing there to resume, or the named checkpoint is damaged.
    """
    if not path.is_dir():
        raise MiniloraError(f"resume_from_checkpoint {str(path)!r}: there is no such directory")
    # Resolved, so that "." and "checkpoint-4/" have a name and a parent.
    path = path.resolve()
    if CHECKPOINT.fullmatch(path.name) or (path / MANIFEST_NAME).exists():
        return _resume_point(path)
    for checkpoint in sorted_checkpoints(path):
        try:
            return _resume_point(checkpoint)
        except MiniloraError:
            continue
    if (path / RUN_NAME).is_file():
        return ResumePoint(path, None, read_run(path))
    raise MiniloraError(
        f"resume_from_checkpoint {str(path)!r} holds neither a complete checkpoint-<step> nor a "
        f"{RUN_NAME}"
    )


def is_resumable(checkpoint: Path) -> bool:
    """Whether a checkpoint, ours or Trainer's, is complete."""
    try:
        _resume_point(checkpoint)
    except MiniloraError:
        return False
    return True


def _resume_point(checkpoint: Path) -> ResumePoint:
    output_dir = checkpoint.parent
    if is_trainer_checkpoint(checkpoint):
        # Trainer writes its state last; what else may be missing is for the loader to judge.
        refuse_links(checkpoint)
        read_progress(checkpoint)
        run = read_run(output_dir) if (output_dir / RUN_NAME).is_file() else None
        return ResumePoint(output_dir, checkpoint, run)
    run = verify(checkpoint).run
    check_recorded(run, checkpoint / MANIFEST_NAME)
    return ResumePoint(output_dir, checkpoint, run)


def clear_way(point: ResumePoint) -> None:
    """Set every checkpoint newer than the resume point aside, with a notice. Call only while
    holding the lock.

    Damaged ones become `.invalid-...`, intact ones (the user chose an older one) `.superseded-...`:
    HF Trainer's `get_last_checkpoint` would pick them otherwise.
    """
    for checkpoint in sorted_checkpoints(point.output_dir):
        if checkpoint == point.checkpoint:
            return
        reason = "superseded" if is_resumable(checkpoint) else "invalid"
        aside = set_aside(checkpoint, reason)
        sys.stderr.write(f"warning: {checkpoint.name} is {reason} and now named {aside.name}\n")


def write_run(output_dir: Path, run: dict[str, Any]) -> None:
    """Write `run.json`."""
    write_file(output_dir / RUN_NAME, (json.dumps(run, indent=2, sort_keys=True) + "\n").encode())


def read_run(output_dir: Path) -> dict[str, Any]:
    """What `run.json` records.

    Raises:
        MiniloraError: it is missing or damaged.
    """
    path = output_dir / RUN_NAME
    run = read_json(path)
    check_recorded(run, path)
    return run


def check_recorded(run: dict[str, Any], path: Path) -> None:
    """Refuse what does not record a run; the arguments themselves are for `resumed_arguments`.

    Raises:
        MiniloraError: names the first part that is missing or of the wrong type.
    """
    labels = run.get("labels")
    if labels is not None and not (
        isinstance(labels, list) and all(isinstance(label, str) for label in labels)
    ):
        raise MiniloraError(f"{path} does not record a run: its labels are {labels!r}")
    for name in ("arguments", "lora", "data_sha256"):
        if not isinstance(run.get(name), dict):
            raise MiniloraError(f"{path} does not record a run: it has no {name}")
    if not isinstance(run.get("model_sha256"), str):
        raise MiniloraError(f"{path} does not record a run: it has no model_sha256")


class MetricsFile:
    """`metrics.jsonl`, holding exactly the rows of `log_history`, whole lines only.

    A row that cannot be written (disk full) is not lost: the next one writes the whole file anew.
    """

    def __init__(self, path: Path, log_history: list[dict[str, Any]]) -> None:
        """Begin with the rows of a checkpoint: those that a killed run wrote after it are dropped."""
        self.path = path
        self.rows = log_history
        self.has_failed = False
        self._try(self._write_all)

    def append(self, row: dict[str, Any]) -> None:
        """Add `row`, which the loop has just appended to `log_history`."""
        self._try(self._write_all if self.has_failed else partial(self._append, row))

    def finish(self) -> None:
        """Write every row, durably.

        Raises:
            OSError: rows that are in no checkpoint would be lost.
        """
        self._write_all()

    def _append(self, row: dict[str, Any]) -> None:
        with self.path.open("ab") as file:
            file.write(_line(row))

    def _write_all(self) -> None:
        write_file(self.path, b"".join(map(_line, self.rows)))

    def _try(self, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:
            if not self.has_failed:
                sys.stderr.write(
                    f"warning: {self.path} cannot be written ({error.strerror}); the rows are kept for later\n"
                )
            self.has_failed = True
        else:
            self.has_failed = False


@contextlib.contextmanager
def explained(output_dir: Path) -> Iterator[None]:
    """Let an `OSError` that comes out say what to do about it, and how the run goes on."""
    try:
        yield
    except OSError as error:
        begun = os.path.isfile(output_dir / RUN_NAME)
        go_on = f"--resume_from_checkpoint {output_dir}" if begun else "start the run again"
        remedy = REMEDIES.get(error.errno or 0, "see to it")
        advice = f"{error.strerror}; no older checkpoint is lost: {remedy}, then {go_on}"
        raise OSError(error.errno, advice, error.filename or str(output_dir)) from error


def _line(row: dict[str, Any]) -> bytes:
    return (json.dumps(row) + "\n").encode()
