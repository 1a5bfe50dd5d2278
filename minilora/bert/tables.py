"""Tables that `datasets` reads: parquet files, and data sets of the Hub or of a directory.

They become what jsonl files of them would hold, with a class's name in the place of its number.
"""

import contextlib
import hashlib
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minilora.errors import MiniloraError
from minilora.reading import opened, read_bytes

# Files of which a row is an object.
OBJECTS = (".json", ".jsonl", ".parquet")
Numbered = tuple[int, dict[str, Any]]  # line, value by column
Records = Callable[[], Iterator[Numbered]]  # a file need not be in memory: it is read anew


@dataclass(frozen=True)
class Table:
    """A split of a data set, in the place of a file."""

    name: str
    records: list[Numbered]
    suffix = ".parquet"

    def __str__(self) -> str:
        return self.name


Source = Path | Table


def file_fingerprint(path: Source) -> str:
    """SHA-256 of a file's bytes, or of a data set's rows: its files differ from place to place."""
    if isinstance(path, Table):
        return hashlib.sha256(json.dumps(path.records).encode()).hexdigest()
    with opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_parquet(path: Path) -> list[Numbered]:
    data = io.BytesIO(read_bytes(path))
    with _reading(str(path)):
        from datasets import Dataset
        from pyarrow import parquet

        return _records(Dataset(parquet.read_table(data)))


def read_dataset(name: str, config: str | None, asked: dict[str, str | None]) -> dict[str, Table]:
    """The splits "train" and so on by what they are `asked` for as, or None: then "test" is left
    out, and "validation", too, where the data set has none.
    """
    with _reading(f"dataset_name {name!r}"):
        from datasets import load_dataset, load_from_disk

        # What `save_to_disk` leaves beside a single split, and several.
        saved = [Path(name, file).is_file() for file in ("state.json", "dataset_dict.json")]
        is_saved = any(saved) and config is None
        found: Any = load_from_disk(name) if is_saved else load_dataset(name, config)
        splits = {"train": found} if saved[0] else found
        usual = {"train"} | ({"validation"} & splits.keys())
        own = {split: word or split for split, word in asked.items() if word or split in usual}
        if lacking := [f"{w!r} (--{s}_split_name)" for s, w in own.items() if w not in splits]:
            raise ValueError(f"it has no split {lacking[0]}, but {', '.join(splits)}")
        return {s: Table(f"{name}[{word}]", _records(splits[word])) for s, word in own.items()}


@contextlib.contextmanager
def _reading(what: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise MiniloraError(f'{what} needs pip install "minilora[datasets]": {error}') from None
    except Exception as error:  # what the network, the Hub and damaged files do has many names
        told = ": ".join(str(each) for each in (error, error.__cause__) if each)
        raise MiniloraError(f"{what} cannot be read: {' '.join(told.split())[:500]}") from None


def _records(dataset: Any) -> list[Numbered]:
    rows = json.loads(json.dumps(dataset.to_list(), default=_as_text))
    for column, feature in dataset.features.items():
        one = getattr(feature, "feature", feature)  # of a list, what it holds
        names = dict(enumerate(getattr(one, "names", [])))  # a class below 0 is none
        for row in rows if names else []:
            ids = row[column]
            row[column] = list(map(names.get, ids)) if isinstance(ids, list) else names.get(ids)
    return list(enumerate(rows, start=1))


def _as_text(value: Any) -> str:
    # Bytes, which some writers make of texts; dates and the like. Other bytes are refused as texts.
    return value.decode(errors="surrogateescape") if isinstance(value, bytes) else str(value)
