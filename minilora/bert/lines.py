"""The text of a file, line by line: memory holds one. Every complaint names file and line."""

import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from minilora.bert.tables import Source
from minilora.errors import MiniloraError
from minilora.options import unique_keys
from minilora.reading import opened, read_bytes

Lines = Iterator[tuple[int, list[str]]]  # (line, its fields)
T = TypeVar("T")


def bad(path: Source | str, line: int, what: str) -> MiniloraError:
    """The error that something is wrong there."""
    return MiniloraError(f"{path}, line {line}: {what}")


def not_empty(path: Source, things: Iterable[T], what: str) -> Iterator[T]:
    """The things of a file, of which there must be one."""
    found = iter(things)
    for thing in found:
        yield thing
        yield from found
        return
    raise MiniloraError(f"{path} is empty: it holds no {what}")


def read_text(path: Source) -> str:
    """The text of a file of UTF-8."""
    assert isinstance(path, Path)  # a table is none
    return _utf8(path, read_bytes(path), 1)


def _utf8(path: Path, data: bytes, line: int) -> str:
    # What begins in this line.
    try:
        return data.decode("utf-8-sig" if line == 1 else "utf-8")  # Excel writes a byte order mark
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        raise bad(path, line, "not UTF-8; convert the file, for example with iconv") from None


def lines_of(path: Source) -> Iterator[tuple[int, str]]:
    """The lines of a file of UTF-8, numbered from 1."""
    for number, line in enumerate(_decoded(path), 1):
        yield number, line.removesuffix("\n")


def _decoded(path: Source) -> Iterator[str]:
    assert isinstance(path, Path)
    # Not str.splitlines, which also splits inside sentences, at U+2028 and U+0085.
    with opened(path) as file:
        for number, line in enumerate(file, 1):
            yield _utf8(path, line, number)


def tsv_lines(path: Source) -> Lines:
    """The fields of each line between tabs."""
    for number, line in lines_of(path):
        yield number, line.rstrip("\r").split("\t")


def csv_lines(path: Source) -> Lines:
    """The fields of each record of RFC 4180, numbered by the line in which it begins."""
    csv.field_size_limit(2**31 - 1)  # by default 131,072 characters
    reader, start = csv.reader(_decoded(path), strict=True), 1
    try:
        for fields in reader:
            yield start, fields
            start = reader.line_num + 1
    except csv.Error as error:
        raise bad(path, start, f"not valid csv: {error}") from None


def parse_json(path: Source, line: int, text: str) -> Any:
    """What the JSON says that begins in this line of a file."""
    try:
        return json.loads(text, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise bad(path, line, f"not valid JSON: {error}") from None
