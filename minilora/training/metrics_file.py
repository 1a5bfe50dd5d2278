"""metrics.jsonl: every row of a run's log.

No other file has them all: `TrainState.log_history`, and so trainer_state.json, keeps the last, and
neither a save nor the memory grows with the run. Before a save the rows are made safe on the disk;
their size and hash are part of it, and a resume cuts the file there (`Stored.metrics`).
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minilora import files
from minilora.reading import check_like, parse_json, read_bytes
from minilora.training import distributed
from minilora.training.loop import TrainState
from minilora.training.progress import say

METRICS_NAME = "metrics.jsonl"
Row = dict[str, Any]
KEPT_ROWS = 100  # for whoever sees a checkpoint alone; a run needs the last evaluation and the best


class MetricsFile:
    """The file as a run writes it, the first of several processes. A row that the disk refuses is
    not lost: the next one, or a save, writes both from where the file was whole.
    """

    def __init__(
        self, path: Path, state: TrainState, contents: bytes | None, show: Callable[[Row], None]
    ) -> None:
        """Begin with what a checkpoint was saved with; where that is gone, with its last rows."""
        self.path, self.state, self.show = path, state, show
        distributed.by_first(lambda: self._begin(contents))

    def append(self, row: Row) -> None:
        """Add `row`, which the loop has just appended to `log_history`."""
        self.show(row)  # first: who joins late takes the rows before it from the file
        rows, best = self.state.log_history, self.state.best_step
        evaluated = [row for row in rows[:-KEPT_ROWS] if "eval_loss" in row]
        needed = [row for row in evaluated if row is evaluated[-1] or row["step"] == best]
        rows[:-KEPT_ROWS] = needed
        if distributed.rank() > 0:
            return
        is_told, self.pending = bool(self.pending), self.pending + text_of([row])
        try:
            self._write()
        except OSError as error:
            if not is_told:
                reason = f"cannot be written ({error.strerror}); the rows are kept for later"
                say(f"warning: {self.path} {reason}")

    def sync(self) -> None:
        """Make every row durable, on rank 0, and note in the state what there is. An `OSError`
        means that rows in no checkpoint would be lost.
        """
        self._write()
        files.sync(self.path)
        self.state.metrics_size, self.state.metrics_sha256 = self.size, self.hash.hexdigest()

    def _begin(self, contents: bytes | None) -> None:
        contents = text_of(self.state.log_history) if contents is None else contents
        files.write_file(self.path, contents)
        self.size, self.hash, self.pending = len(contents), hashlib.sha256(contents), b""

    def _write(self) -> None:
        if not self.path.is_file() or self.path.stat().st_size < self.size:
            self._begin(None)
            say(f"warning: {self.path} was removed or cut: it begins anew with the last rows")
        with self.path.open("r+b") as file:
            file.seek(self.size)
            file.write(self.pending)
            file.truncate()  # what a refused write may have left
        self.size += len(self.pending)
        self.hash.update(self.pending)
        self.pending = b""


def text_of(rows: list[Row]) -> bytes:
    """The lines of these rows."""
    return "".join(f"{files.json_text(row)}\n" for row in rows).encode()


def parse_rows(contents: bytes, path: Path) -> list[Row]:
    """The rows of these lines, null standing for NaN and infinity."""
    rows = [parse_json(line, path) for line in contents.splitlines()]
    for row in rows:
        check_like({"step": int}, row, path, "a row")
    return rows


def read_rows(output_dir: Path) -> list[Row]:
    """Every row of a run; none where none has been written."""
    path = output_dir / METRICS_NAME
    return parse_rows(read_bytes(path), path) if path.is_file() else []
