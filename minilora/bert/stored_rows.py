"""The rows of a file, read from it once, and from then on as they are asked for.

They lie as JSON in one array of bytes, which `cache` keeps: memory has those being looked at.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from itertools import islice
from types import SimpleNamespace
from typing import Any

import numpy as np

from minilora.bert import cache
from minilora.bert.examples import Arrays, Tokenizer
from minilora.bert.rows import Row
from minilora.bert.tables import Source, file_fingerprint
from minilora.bert.tasks import READING, Arguments, Task
from minilora.errors import MiniloraError

# Rows that are in memory at a time: many for the threads of a tokenizer, few beside a model.
CHUNK = 1000


class StoredRows(Sequence[Row]):
    """Rows by index. `key`: of what file, read how, and which of its rows, as JSON."""

    def __init__(self, arrays: Arrays, key: Any, chosen: np.ndarray | None = None) -> None:
        self.arrays, self.key = arrays, key
        self.chosen = np.arange(len(arrays["ends"])) if chosen is None else chosen

    def take(self, chosen: np.ndarray) -> "StoredRows":
        """Those of all rows, by index, in that order."""
        key = [self.key, hashlib.sha256(chosen.tobytes()).hexdigest()]
        return StoredRows(self.arrays, key, chosen)

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self._rows(self.chosen[index])
        return self._rows(self.chosen[[index]])[0]

    def __iter__(self) -> Iterator[Row]:
        for start in range(0, len(self), CHUNK):
            yield from self[start : start + CHUNK]

    def _rows(self, indices: np.ndarray) -> list[Row]:
        data, ends = self.arrays["json"], self.arrays["ends"]
        starts = np.where(indices > 0, ends[indices - 1], 0)
        places = zip(starts.tolist(), ends[indices].tolist(), strict=True)
        texts = b",".join(data[start:end].tobytes() for start, end in places)
        cache.release(data)
        return [Row(*values) for values in json.loads(b"[%b]" % texts)]


def store_rows(source: Source, task: type[Task], arguments: Arguments, sha256: str) -> StoredRows:
    """The labelled rows of a file with this fingerprint, kept for other runs."""
    asked = {name: getattr(arguments, name) for name in READING}
    key = [task.name, source.suffix.lower(), asked, sha256]

    def pieces() -> Iterator[Arrays]:
        rows, total = iter(task.read_rows(source, SimpleNamespace(**asked), True)), 0
        while chunk := list(islice(rows, CHUNK)):
            texts = [json.dumps(values).encode() for values in _values(chunk)]
            ends = total + np.cumsum([len(text) for text in texts])
            yield {"json": np.frombuffer(b"".join(texts), dtype=np.uint8), "ends": ends}
            total = ends[-1]
        if file_fingerprint(source) != sha256:
            raise MiniloraError(f"{source} was changed while it was read: start again")

    return StoredRows(cache.mapped(["rows", key], pieces), key)


def find_labels(rows: StoredRows, task: type[Task], file: str) -> list[str] | None:
    """What the task finds in the training rows, kept, too."""

    def pieces() -> Iterator[Arrays]:
        found = json.dumps(task.find_labels(rows, file))
        yield {"json": np.frombuffer(found.encode(), dtype=np.uint8)}

    return json.loads(cache.mapped(["labels", rows.key], pieces)["json"].tobytes())


def tokens_key(
    rows: Sequence[Row], task: Task, tokenizer: Tokenizer, max_length: int
) -> list[Any] | None:
    """All that the tokens of rows depend on; None of a slow tokenizer, whose state is code."""
    if not tokenizer.is_fast:
        return None
    # A call leaves truncation and padding in the state: this one, the same whatever was before.
    tokenizer("", truncation=True, max_length=max_length)
    state = tokenizer.backend_tokenizer.to_str()  # pyright: ignore
    names = [type(tokenizer).__name__, tokenizer.model_input_names, tokenizer.truncation_side]
    names += [tokenizer.split_special_tokens, tokenizer.all_special_tokens, tokenizer.mask_token]
    names += [version("tokenizers"), version("transformers")]  # the state is theirs to carry out
    content = rows.key if isinstance(rows, StoredRows) else _values(rows)
    return ["tokens", task.name, vars(task), max_length, names, state, content]


def _values(rows: Iterable[Row]) -> list[list[Any]]:
    return [[*row[:-1], {**row.fields}] for row in rows]  # JSON knows dicts alone
